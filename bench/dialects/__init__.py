"""Other tools' recipes as these tools themselves carry them out, in environments of their own."""
