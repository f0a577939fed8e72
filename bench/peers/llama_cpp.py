"""What llama.cpp makes of GGUF files; for an environment of its own.

    python -m venv llama && llama/bin/pip install xllamacpp==2026.10.11549
    llama/bin/python -m bench.peers.llama_cpp TEXT MODEL.gguf [MMPROJ.gguf PICTURE.png]

The last line is one JSON object: after TEXT, and after a chat turn of PICTURE and TEXT, the
logarithm of the probability of every likely next token. Attention and its cache are float32; what
remains of a difference to float arithmetic is that llama.cpp rounds the inputs of quantized layers
to 8 bits.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

LIKELY = 64


def main() -> None:
    """Run the prompts."""
    import xllamacpp as llama

    text, model, *seen = sys.argv[1:]
    parameters = llama.CommonParams()
    parameters.model.path = model
    if seen:
        parameters.mmproj.path = seen[0]
        parameters.mmproj_use_gpu = False
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(parameters)
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": LIKELY}
    answers = {"text": server.handle_completions({"prompt": text, "n_probs": LIKELY, **asked})}
    if seen:
        image = base64.b64encode(Path(seen[1]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": text},
        ]
        messages = [{"role": "user", "content": content}]
        answers["picture"] = server.handle_chat_completions({"messages": messages, **asked})
    print(json.dumps({name: likely(answer) for name, answer in answers.items()}))


def likely(answer: Any) -> dict[str, Any]:
    """The next token's candidates, and the number of tokens before it."""
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp says: {answer}")
    (first, *_) = answer["choices"][0]["logprobs"]["content"]
    return {
        "tokens": answer["usage"]["prompt_tokens"],
        "candidates": [[entry["id"], entry["logprob"]] for entry in first["top_logprobs"]],
    }


if __name__ == "__main__":
    main()
