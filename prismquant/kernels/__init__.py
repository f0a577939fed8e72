"""Faster twins of tensor code, for devices that have them.

Each says by a function what it takes. What it does not take, the caller does in torch, which is
the reference; a package or a device that is missing is therefore no error.
"""
