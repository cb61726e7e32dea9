"""Real architectures, small and with random weights: the modules of torchvision, timm and transformers themselves."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, WORDS, TOKENS = 10, 50, 12


class Example(NamedTuple):
    """A model, and what it predicts of one drawn batch.

    Attributes:
        model: the model.
        draw: draws a batch.
        logits: of the model's predictions of a batch, (cases, classes).
        fisher: which one is taken.
    """

    model: nn.Module
    draw: Callable[[], Any]
    logits: Callable[[Any], Tensor]
    fisher: str = "mc"


def _images(model: nn.Module, size: int = 32, batch: int = 4) -> Example:
    return Example(model, lambda: torch.randn(batch, 3, size, size), lambda x: model(x))


def _sentences(
    model: nn.Module, logits: Callable[[Tensor], Tensor] | None = None, fisher: str = "mc", words: int = WORDS
) -> Example:
    def of_tokens(x: Tensor) -> Tensor:
        return model(input_ids=x).logits.flatten(0, -2)

    return Example(model, lambda: torch.randint(3, words, (4, TOKENS)), logits or of_tokens, fisher)


def _of(module: str, name: str = "") -> Any:
    found: ModuleType = importlib.import_module(module)
    return getattr(found, name) if name else found


# -- torchvision ------------------------------------------------------------------------------------------------


def _vgg() -> Example:
    vgg = _of("torchvision.models.vgg")
    model = vgg.VGG(vgg.make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True), num_classes=CLASSES)
    model.avgpool, model.classifier = (
        nn.AdaptiveAvgPool2d(2),
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    return _images(model)


def _densenet() -> Example:
    return _images(_of("torchvision.models", "DenseNet")(8, (2, 2, 2), 8, num_classes=CLASSES))


def _mobilenet() -> Example:
    return _images(_of("torchvision.models", "mobilenet_v3_small")(width_mult=0.25, num_classes=CLASSES))


def _efficientnet() -> Example:
    efficientnet = _of("torchvision.models.efficientnet")
    setting, last = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.4)
    return _images(efficientnet.EfficientNet(setting, 0.2, num_classes=CLASSES, last_channel=last))


def _convnext() -> Example:
    convnext = _of("torchvision.models.convnext")
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
    return _images(convnext.ConvNeXt(blocks, num_classes=CLASSES))


def _swin(version: int) -> Example:
    swin = _of("torchvision.models.swin_transformer")
    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return _images(swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, **second))


def _vit() -> Example:
    return _images(_of("torchvision.models", "VisionTransformer")(32, 8, 2, 2, 32, 64, num_classes=CLASSES))


# -- timm -------------------------------------------------------------------------------------------------------


def _timm(module: str, name: str, **config: Any) -> Example:
    return _images(_of(f"timm.models.{module}", name)(num_classes=CLASSES, **config))


def _timm_resnet() -> Example:
    block = _of("timm.models.resnet", "BasicBlock")
    return _timm("resnet", "ResNet", block=block, layers=(1, 1, 1, 1), channels=(8, 16, 16, 32), stem_width=8)


_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


# -- transformers -----------------------------------------------------------------------------------------------


def _hugging(config: str, model: str, **sizes: Any) -> nn.Module:
    transformers = _of("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def _bert(config: str = "BertConfig", model: str = "BertForSequenceClassification", **sizes: Any) -> Example:
    small = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    net = _hugging(
        config, model, intermediate_size=64, num_labels=CLASSES, max_position_embeddings=32, **small, **sizes
    )

    def padded(x: Tensor) -> Tensor:
        lengths = torch.tensor([[TOKENS], [TOKENS - 3], [TOKENS], [5]])
        out: Tensor = net(input_ids=x, attention_mask=(torch.arange(TOKENS) < lengths).long()).logits
        return out

    return _sentences(net, padded)


def _gpt2(tied: bool) -> Example:
    return _sentences(
        _hugging("GPT2Config", "GPT2LMHeadModel", vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=2, n_head=2,
                 tie_word_embeddings=tied)
    )  # fmt: skip


_DECODER = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False, "use_cache": False,
}  # fmt: skip


def _llama(checkpointed: bool = False, reentrant: bool = False, fisher: str = "mc") -> Example:
    model = _hugging("LlamaConfig", "LlamaForCausalLM", **_DECODER)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            model.enable_input_require_grads()  # type: ignore[operator]
        model.train()
    return _sentences(model, fisher=fisher)


def _t5() -> Example:
    model = _hugging("T5Config", "T5ForConditionalGeneration", vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48,
                     num_layers=2, num_heads=4, tie_word_embeddings=False, decoder_start_token_id=0,
                     use_cache=False)  # fmt: skip
    return _sentences(model, lambda x: model(input_ids=x, decoder_input_ids=x[:, :7]).logits.flatten(0, 1))


def _mamba() -> Example:
    return _sentences(
        _hugging("MambaConfig", "MambaForCausalLM", vocab_size=WORDS, hidden_size=16, state_size=4, num_hidden_layers=2,
                 tie_word_embeddings=False, use_cache=False)
    )  # fmt: skip


def _whisper() -> Example:
    model = _hugging("WhisperConfig", "WhisperForConditionalGeneration", vocab_size=WORDS, d_model=32, encoder_layers=2,
                     decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
                     decoder_ffn_dim=48, max_source_positions=16, max_target_positions=16, num_mel_bins=8,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                     tie_word_embeddings=False)  # fmt: skip
    words = torch.randint(3, WORDS, (4, 7))
    return Example(
        model,
        lambda: torch.randn(4, 8, 32),
        lambda x: model(input_features=x, decoder_input_ids=words).logits.flatten(0, 1),
    )


def _wav2vec() -> Example:
    model = _hugging("Wav2Vec2Config", "Wav2Vec2ForCTC", vocab_size=CLASSES, hidden_size=32, num_hidden_layers=2,
                     num_attention_heads=2, intermediate_size=48, conv_dim=(8, 16), conv_stride=(5, 2),
                     conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
                     num_conv_pos_embedding_groups=2,
                     apply_spec_augment=False)  # fmt: skip
    return Example(model, lambda: torch.randn(4, 200), lambda x: model(x).logits.flatten(0, 1))


# -- of our own -------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """One head over four levels, as in RetinaNet and FCOS."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Conv2d(c, 12, 3, 2, 1) for c in (3, 12, 12, 12))
        self.head = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU(), nn.Conv2d(12, CLASSES, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits at all places of all levels."""
        outs = []
        for conv in self.body:
            x = F.relu(conv(x))
            outs.append(self.head(x).flatten(2).transpose(1, 2))
        return torch.cat(outs, 1).flatten(0, 1)


class UNet(nn.Module):
    """Down by strides, up by transposed convolutions, across by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(24, 8, 4, 2, 1)])
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits at all places."""
        one = F.relu(self.down[0](x))
        two = F.relu(self.down[1](one))
        three = F.relu(self.down[2](two))
        two = torch.cat([F.relu(self.up[0](three)), two], 1)
        one = torch.cat([F.relu(self.up[1](two)), one], 1)
        out: Tensor = self.head(one)
        return out.flatten(2).transpose(1, 2).flatten(0, 1)


class Experts(nn.Module):
    """A transformer's mixture of experts: each sees the tokens that are sent to it."""

    def __init__(self, width: int = 16, experts: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.embed, self.gate = nn.Embedding(WORDS, width), nn.Linear(width, experts, bias=False)
        make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width))  # noqa: E731
        self.experts, self.chosen = nn.ModuleList(make() for _ in range(experts)), chosen
        self.head = nn.Linear(width, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of all tokens."""
        h = self.embed(x).flatten(0, 1)
        weights, chosen = self.gate(h).softmax(1).topk(self.chosen)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(h[rows]) * weights[rows, place, None])
        logits: Tensor = self.head(h + out)
        return logits


class Recurrent(nn.Module):
    """An LSTM, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(WORDS, 16),
            nn.LSTM(16, 24, batch_first=True),
            nn.Linear(24, WORDS),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of all tokens."""
        logits: Tensor = self.head(self.body(self.embed(x))[0])
        return logits.flatten(0, 1)


class Detection(nn.Module):
    """DETR's parts: convolutions, `nn.Transformer`, queries, and a head for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.queries = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(5, 32))
        self.transformer = nn.Transformer(32, 2, 1, 1, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of all queries."""
        h = self.transformer(self.body(x).flatten(2).transpose(1, 2), self.queries.expand(len(x), -1, -1))
        logits: Tensor = self.head(h)
        return logits.flatten(0, 1)


def _own(make: Callable[[], nn.Module], images: bool = True) -> Example:
    model = make()
    return _images(model) if images else _sentences(model, lambda x: model(x))


Makers = dict[str, Callable[[], Example]]
TORCHVISION: Makers = {
    "VGG with batch norm": _vgg,
    "DenseNet": _densenet,
    "MobileNetV3": _mobilenet,
    "EfficientNet": _efficientnet,
    "ConvNeXt": _convnext,
    "Swin": partial(_swin, 1),
    "Swin v2": partial(_swin, 2),
    "ViT": _vit,
}
TIMM: Makers = {
    "ResNet": _timm_resnet,
    "ViT (timm)": partial(_timm, "vision_transformer", "VisionTransformer", **_SMALL),
    "BEiT": partial(_timm, "beit", "Beit", **_SMALL),
    "EVA": partial(_timm, "eva", "Eva", **_SMALL),
    "MLP-Mixer": partial(_timm, "mlp_mixer", "MlpMixer", img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "ResNetV2, standardised weights": partial(
        _timm, "resnetv2", "ResNetV2", layers=(1, 1), channels=(128, 256), stem_chs=32
    ),
}
TRANSFORMERS: Makers = {
    "BERT, padded": _bert,
    "ALBERT, padded": partial(_bert, "AlbertConfig", "AlbertForSequenceClassification", embedding_size=16),
    "GPT-2, tied": partial(_gpt2, True),
    "GPT-2": partial(_gpt2, False),
    "Llama": _llama,
    "Llama, checkpointed": partial(_llama, True),
    "Llama, checkpointed reentrantly": partial(_llama, True, True),
    "the same, empirical Fisher": partial(_llama, True, True, "empirical"),
    "T5": _t5,
    "Mamba": _mamba,
    "Mixtral": lambda: _sentences(
        _hugging("MixtralConfig", "MixtralForCausalLM", **_DECODER, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Whisper": _whisper,
    "Wav2Vec2": _wav2vec,
}
OWN: Makers = {
    "RetinaNet's repeated head": partial(_own, Pyramid),
    "U-Net": partial(_own, UNet),
    "mixture of experts": partial(_own, Experts, False),
    "LSTM": partial(_own, Recurrent, False),
    "DETR": partial(_own, Detection),
}
PACKAGES: Sequence[tuple[str, Makers]] = (
    ("torchvision", TORCHVISION), ("timm", TIMM), ("transformers", TRANSFORMERS), ("torch", OWN)
)  # fmt: skip
