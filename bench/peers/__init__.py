"""Other tools on the same model, in environments of their own."""
