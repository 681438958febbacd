import sys

# CI fails on a test that was skipped because something is "not installed".
NO_TORCH = "torch is not installed" if sys.version_info < (3, 12) else "the extra test has torch on Python 3.11 alone"
