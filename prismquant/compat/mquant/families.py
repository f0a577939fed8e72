"""Model families that MQuant, or its fork, has entry points for: what it calls their parts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of models, as its entry points see it.

    Attributes:
        title: Name for people.
        hf_class: Class of transformers that runs it.
        entry: Entry point for all its parts.
        connector: The flag that quantizes its connector.
        renamed: Beginnings of module paths here, and of the keys of quantizers there.
        wrapped: Whether layers are wrapped there: then their keys end in ``.module``.
        remote_class: Class of code that original checkpoints bring along; empty: they bring none.
    """

    title: str
    hf_class: str
    entry: str
    connector: str
    renamed: tuple[tuple[str, str], ...]
    wrapped: bool
    remote_class: str = ""

    def key(self, name: str, *, split: bool) -> str:
        """The key of a layer's quantizer.

        Args:
            name: Its module path in transformers.
            split: Whether a column of its input stays in floating point, by a layer of its own.
        """
        for ours, theirs in self.renamed:
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        return f"{name}.L2" if split else f"{name}.module" if self.wrapped else name


QWEN2_VL = Family(
    title="Qwen2-VL",
    hf_class="Qwen2VLForConditionalGeneration",
    entry="qwen2vl_rtn_gptq_fwrd_plus",
    connector="quant_cross_attention",
    renamed=(("model.language_model.layers.", "model.model.layers."),),
    wrapped=True,
)
VIDEOLLAMA3 = Family(
    title="VideoLLaMA3",
    hf_class="VideoLlama3ForConditionalGeneration",
    entry="videollama3_rtn_gptq_fwrd_plus",
    connector="quant_visual_projector",
    renamed=(
        ("model.language_model.layers.", "model.model.layers."),
        ("model.vision_model.", "model.vision_encoder."),
        ("model.projector.", "model.mm_projector."),
    ),
    wrapped=False,
    remote_class="Videollama3Qwen2ForCausalLM",
)
FAMILIES = (QWEN2_VL, VIDEOLLAMA3)
"""All of them."""
