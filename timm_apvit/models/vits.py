"""timm's classes on adaptive patches: what differs from one to the other."""

from timm.layers import apply_keep_indices_nlc
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor

from timm_apvit.models.checkpoint import check_npz
from timm_apvit.models.mixin import APViT
from timm_apvit.models.patch_embed import PatchTokens
from timm_apvit.models.rope import rope_at


class AdaptiveVisionTransformer(APViT, VisionTransformer):  # type: ignore[misc]
    """timm's ``VisionTransformer`` on adaptive patches."""

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load an original JAX checkpoint (.npz), which must be of this model's size.

        Raises:
            ValueError: it is of another size.
        """
        check_npz(checkpoint_path, self)
        super().load_pretrained(checkpoint_path, prefix)


class AdaptiveVisionTransformerDistilled(APViT, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's ``VisionTransformerDistilled``, with a distillation token and a head for it, on adaptive patches."""


class AdaptiveEva(APViT, Eva):  # type: ignore[misc]
    """timm's ``Eva`` (EVA, EVA-02, DINOv3, PE, RoPE-ViT) on adaptive patches.

    Modifications of timm's ``Eva``:
        ``_pos_embed`` also turns the rotary embedding to the patches' centres, in the units of the base grid if a
        number of patches is set.
    """

    def _pos_embed(self, x: PatchTokens) -> tuple[Tensor, Tensor | None]:
        """Tokens with their position ``(B, T + N, D)``, and RoPE.

        That is ``(B, 1, N, 2 d)``, or ``(depth, B, heads, N, 2 d)`` if it is mixed, as timm has it after patch dropout.
        """
        tokens = super()._pos_embed(x)
        rope = None
        if self.rope is not None:
            # While FX traces, x.base_grid stands for no numbers; that of a set layout does.
            follows_input = self.patch_embed.layout is None
            rope = rope_at(self.rope, x.positions, x.base_grid if follows_input else self.patch_embed.grid_size)
        if self.patch_drop is not None:
            tokens, kept = self.patch_drop(tokens)
            if rope is not None and kept is not None:
                rope = apply_keep_indices_nlc(tokens, rope, kept, pos_embed_has_batch=True)
        if rope is None:
            return tokens, None
        return tokens, rope.transpose(0, 1) if self.rope_mixed else rope.unsqueeze(1)


# timm's classes that can be adaptive, and what they are then.
ADAPTIVE_CLASSES: dict[type, type[APViT]] = {
    VisionTransformer: AdaptiveVisionTransformer,
    VisionTransformerDistilled: AdaptiveVisionTransformerDistilled,
    Eva: AdaptiveEva,
}
