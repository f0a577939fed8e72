"""Methods of analysis: one file each."""
