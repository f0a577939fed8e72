"""Every number format, written in every export, read by every reader that can be had."""
