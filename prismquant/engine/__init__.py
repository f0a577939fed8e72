"""The engine: a model streamed unit by unit, observed, quantized and handed on."""
