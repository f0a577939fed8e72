"""What a quantized layer is at run time."""
