"""Bad input by the thousand, through the command line: what is not accepted must be refused in one clear line."""
