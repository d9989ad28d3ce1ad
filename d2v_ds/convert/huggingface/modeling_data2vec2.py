"""data2vec 2.0 (arXiv:2212.07525) for transformers: an encoder of sound, images or text, and fine-tuning heads.

Written by d2v_ds (`d2v export --format hf`) into every folder of exported weights. It stands alone: it imports
torch and transformers, nothing else. Tensors have the names that d2v_ds gives them.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)

B samples, S waveform samples, T tokens, E extra tokens, D dim, H heads.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    ImageProcessingMixin,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.image_transforms import to_pil_image
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

INPUTS = {"audio": "input_values", "image": "pixel_values", "text": "input_ids"}
BICUBIC = 3  # PIL's number of it
DEFAULTS: dict[str, Any] = {
    "modality": "audio",  # audio, image or text
    "hidden_size": 768,
    "num_hidden_layers": 12,  # prenet layers included
    "num_prenet_layers": 0,  # layers of the modality's own, before the shared ones
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-5,
    "norm_first": False,  # norms before attention and MLP
    "final_norm": False,  # a norm after the last layer
    "layer_scale": False,  # a learned factor on the channels of each residual branch
    "qkv_bias": "all",  # or "qv": none on the keys
    "hidden_dropout": 0.0,  # after attention
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,  # inside the MLP
    "mlp_dropout": 0.0,  # on the MLP's output
    "input_dropout": 0.0,  # on the first layer's input
    "num_extra_tokens": 0,  # tokens of no position, before all others: the class token of images
    "input_norm": True,  # a norm before the first layer
    "alibi_layers": 0,  # 0: no ALiBi; 1: one learned scale for all layers; else one for each
    "alibi_per_head": True,
    "conv_dim": [512] * 7,  # audio: channels, kernels, strides of the feature extractor
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "position_layers": 5,  # audio: convolutions that stand for positions
    "position_kernel": 19,
    "position_groups": 16,
    "position_norm": False,  # a norm before them
    "position_padding": "zero",  # padded frames in them: zero, zero_once (in their input), or keep
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "position_bias_tables": 0,  # images: 0: fixed sine positions; else tables of relative biases
    "vocab_size": 50265,  # text; or letters of a CTC head
    "max_position_embeddings": 514,  # text: two more than the longest text
    "embedding_norm": True,
    "embedding_norm_eps": 1e-5,
    "embedding_dropout": 0.0,
    "pad_token_id": 1,  # of a CTC head, the blank
    "bos_token_id": 0,
    "eos_token_id": 2,
    "final_dropout": 0.0,  # before a head
    "initializer_range": 0.02,
}


class Data2Vec2Config(PretrainedConfig):
    """What the encoder of one modality needs to be built: `DEFAULTS`, by keyword."""

    model_type = "data2vec2"

    def __init__(self, **kwargs: Any):
        settings = {name: kwargs.pop(name, value) for name, value in DEFAULTS.items()}
        if settings["modality"] not in INPUTS:
            raise ValueError(f"modality={settings['modality']!r} must be one of {', '.join(INPUTS)}")
        super().__init__(**kwargs)
        for name, value in settings.items():
            setattr(self, name, value)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Waveform samples a frame."""
        return math.prod(self.conv_stride)


# ---- what comes in ----


class Data2Vec2FeatureExtractor(Wav2Vec2FeatureExtractor):
    """Waveforms of 16 kHz -> zero mean and unit variance, padded, with the mask; as in training (eps 1e-5)."""

    def __init__(self, return_attention_mask: bool = True, **kwargs: Any):
        super().__init__(return_attention_mask=return_attention_mask, **kwargs)

    @staticmethod
    def zero_mean_unit_var_norm(
        input_values: list[Any], attention_mask: Any | None, padding_value: float = 0.0
    ) -> list[Any]:
        normed = []
        for row, values in enumerate(input_values):
            values = torch.as_tensor(values, dtype=torch.float32)
            length = len(values) if attention_mask is None else int(attention_mask[row].sum())
            real = F.layer_norm(values[:length], (length,))
            normed.append(F.pad(real, (0, len(values) - length), value=padding_value).numpy())
        return normed


class ImageSettings(TypedDict, total=False):
    """What `from_pretrained` may be given besides what is stored."""

    size: dict[str, int]
    image_mean: list[float]
    image_std: list[float]


class Data2Vec2ImageProcessor(ImageProcessingMixin):
    """Images of any size -> RGB, resized whole (PIL, bicubic), normalised; pixel_values (B, 3, H, W)."""

    model_input_names = ["pixel_values"]
    valid_kwargs = ImageSettings

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        image_std: tuple[float, ...] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """`images`: one or a list of PIL images, or of arrays or tensors that transformers can turn into them."""
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 3) == 4
        rows = [self.prepare(image).numpy() for image in (images if several else [images])]
        return BatchFeature({"pixel_values": rows}, tensor_type=return_tensors)

    def prepare(self, image: Any) -> Tensor:
        image = to_pil_image(image)
        if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip to white
            image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image = image.convert("RGB").resize((self.size["width"], self.size["height"]), BICUBIC)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


# ---- one modality's own part ----


class NormFp32(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class Waveform(nn.Module):
    """Strided convolutions over the waveform: (B, S) -> (B, T, D)."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        channels = [1, *config.conv_dim]
        self.convs = nn.ModuleList(
            nn.Conv1d(c_in, c, kernel, stride, bias=False)
            for c_in, c, kernel, stride in zip(
                channels, config.conv_dim, config.conv_kernel, config.conv_stride, strict=False
            )
        )
        self.norms = nn.ModuleList(NormFp32(c, eps=1e-5) for c in config.conv_dim)
        self.norm = nn.LayerNorm(channels[-1], eps=1e-5)
        self.proj = nn.Linear(channels[-1], config.hidden_size)

    def forward(self, input_values: Tensor) -> Tensor:
        x = input_values[:, None]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).transpose(1, 2)).transpose(1, 2))
        return self.proj(self.norm(x.transpose(1, 2)))


class Patches(nn.Module):
    """Non-overlapping patches, row by row: (B, C, H, W) -> (B, T, D)."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.size = config.image_size
        self.proj = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[2:] != (self.size, self.size):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} must be (B, C, {self.size}, {self.size}); "
                "AutoImageProcessor makes them so"
            )
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class Tokens(nn.Module):
    """Token and position embeddings: (B, T) -> (B, T, D). Positions count tokens that are no padding."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.pad, dim = config.pad_token_id, config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, dim, padding_idx=self.pad)
        self.positions = nn.Embedding(config.max_position_embeddings, dim, padding_idx=self.pad)
        self.norm = (
            nn.LayerNorm(dim, eps=config.embedding_norm_eps) if config.embedding_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        is_token = (input_ids != self.pad).long()
        positions = is_token.cumsum(dim=1) * is_token + self.pad
        return self.dropout(self.norm(self.tokens(input_ids) + self.positions(positions)))


class ConvBlock(nn.Module):
    """Grouped convolution of 'same' length, channel norm without affine, GELU; (B, D, T) -> (B, D, T)."""

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)[:, :, : x.shape[2]]  # an even kernel gives one frame too many
        return F.gelu(F.layer_norm(x.transpose(1, 2), (x.shape[1],))).transpose(1, 2)


class ConvPositions(nn.Module):
    """Convolutions in series whose output stands for positions; (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        dim = config.hidden_size
        self.pre_norm = nn.LayerNorm(dim, eps=1e-5) if config.position_norm else None
        self.convs = nn.ModuleList(
            ConvBlock(dim, config.position_kernel, config.position_groups)
            for _ in range(config.position_layers)
        )
        self.padding = config.position_padding

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if padding is not None and self.padding == "zero_once":
            x = x.masked_fill(padding[:, :, None], 0)
        x = x if self.pre_norm is None else self.pre_norm(x)
        x = x.transpose(1, 2)
        for conv in self.convs:
            if padding is not None and self.padding == "zero":
                x = x.masked_fill(padding[:, None], 0)
            x = conv(x)
        return x.transpose(1, 2)


class Context(nn.Module):
    """Positions, extra tokens, norm and prenet layers between the tokens and the shared layers."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.config, dim, heads = config, config.hidden_size, config.num_attention_heads
        self.side = config.image_size // config.patch_size
        self.conv_positions = ConvPositions(config) if config.modality == "audio" else None
        if config.num_extra_tokens:
            self.extra_tokens = nn.Parameter(torch.zeros(1, config.num_extra_tokens, dim))
        if config.alibi_layers:
            self.alibi_scale = nn.Parameter(
                torch.ones(config.alibi_layers, heads if config.alibi_per_head else 1)
            )
        if config.position_bias_tables:
            rows = (2 * self.side - 1) ** 2 + 3
            self.relative_bias = nn.Parameter(torch.zeros(config.position_bias_tables, rows, heads))
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps) if config.input_norm else None
        self.dropout = nn.Dropout(config.input_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_prenet_layers))

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The first layer's input (B, E + T, D), attention biases (none, one, or one a layer), and padding."""
        if self.conv_positions is not None:
            x = x + self.conv_positions(x, padding)
        elif self.config.modality == "image" and not self.config.position_bias_tables:
            x = x + sine_positions(x.shape[2], self.side).to(x)
        tokens, extra = x.shape[1], self.config.num_extra_tokens
        if extra:
            x = torch.cat([self.extra_tokens.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
            padding = None if padding is None else F.pad(padding, (extra, 0), value=False)
        biases = self.make_biases(tokens, x)
        return self.dropout(x if self.norm is None else self.norm(x)), biases, padding

    def make_biases(self, tokens: int, x: Tensor) -> tuple[Tensor, ...]:
        """Each (1, H, E + T, E + T); ALiBi's are fp32, as bf16 cannot tell far frames apart."""
        if self.config.position_bias_tables:
            rows = relative_rows(self.side, self.config.num_extra_tokens).to(x.device)
            return tuple(table[rows].permute(2, 0, 1)[None].to(x.dtype) for table in self.relative_bias)
        if not self.config.alibi_layers:
            return ()
        extra, places = self.config.num_extra_tokens, torch.arange(tokens, device=x.device)
        distance = F.pad((places[:, None] - places).abs().float(), (extra, 0, extra, 0))
        slopes = alibi_slopes(self.config.num_attention_heads).to(x.device)
        return tuple(
            -(scale.float() * slopes)[None, :, None, None] * distance
            for scale in self.alibi_scale.clamp(min=0)
        )


def sine_positions(dim: int, side: int) -> Tensor:
    """Fixed positions (side * side, D): the first half of the channels says the column, the second the row."""
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([code.repeat(side, 1), code.repeat_interleave(side, dim=0)], dim=1).float()


def relative_rows(side: int, extra: int) -> Tensor:
    """Which row of a table each pair of tokens reads, (E + T, E + T): by their distance in rows and columns; the
    last three are for (extra, patch), (patch, extra) and (extra, extra), as in BEiT (arXiv:2106.08254)."""
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down, right = rows[:, None] - rows + side - 1, columns[:, None] - columns + side - 1
    distances = (2 * side - 1) ** 2
    index = torch.full((extra + side * side,) * 2, distances + 2)
    index[extra:, extra:] = down * (2 * side - 1) + right
    index[:extra, extra:] = distances
    index[extra:, :extra] = distances + 1
    return index


def alibi_slopes(heads: int) -> Tensor:
    """(H,) in fp32 (arXiv:2108.12409); for H no power of two, every second slope of the next one is added."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    more = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return torch.tensor(slopes + more[: heads - power])


# ---- the transformer ----


class Attention(nn.Module):
    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias == "all")
        self.q_bias = self.v_bias = None
        if config.qkv_bias == "qv":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.dropout, self.proj_dropout = config.attention_dropout, nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None, with_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the attention (B, H, T, T) if asked for."""
        rows, tokens, dim = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = qkv.view(rows, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        if padding is not None:
            bias = x.new_zeros(1, 1, 1, 1) if bias is None else bias
            bias = bias.masked_fill(padding[:, None, None, :], torch.finfo(bias.dtype).min)
        dropout, weights = self.dropout if self.training else 0.0, None
        if with_weights or (bias is not None and bias.dtype != q.dtype):
            logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
            weights = torch.softmax(logits if bias is None else logits + bias, dim=-1).to(q.dtype)
            y = F.dropout(weights, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(rows, tokens, dim)
        return self.proj_dropout(self.proj(y)), weights


class MLP(nn.Module):
    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Transformer block; its norms stand after attention and MLP (and their residuals) unless `norm_first`."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attn = Attention(config)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(config)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(config.mlp_dropout)
        self.norm_first = config.norm_first
        self.scale1 = self.scale2 = None
        if config.layer_scale:
            self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None, with_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        before = self.norm1(x) if self.norm_first else x
        y, weights = self.attn(before, bias, padding, with_weights)
        x = x + (y if self.scale1 is None else y * self.scale1)
        x = x if self.norm_first else self.norm1(x)
        y = self.dropout(self.mlp(self.norm2(x) if self.norm_first else x))
        x = x + (y if self.scale2 is None else y * self.scale2)
        return (x if self.norm_first else self.norm2(x)), weights


class Data2Vec2PreTrainedModel(PreTrainedModel):
    config_class = Data2Vec2Config
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: Data2Vec2Config, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.main_input_name = INPUTS[config.modality]

    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint does not hold: N(0, 0.02), biases 0, norms 1."""
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("extra_tokens", "relative_bias"):
                nn.init.normal_(parameter, std=self.config.initializer_range)
            elif name in ("alibi_scale", "scale1", "scale2"):
                nn.init.ones_(parameter)
            elif name in ("q_bias", "v_bias"):
                nn.init.zeros_(parameter)

    def _get_feat_extract_output_lengths(self, input_lengths: Any) -> Any:
        """Frames of waveforms of so many samples (audio)."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            input_lengths = (input_lengths - kernel) // stride + 1
        return input_lengths

    def _get_feature_vector_attention_mask(self, frames: int, attention_mask: Tensor) -> Tensor:
        """Bool (B, frames), True = a frame that the waveform alone would have; from a mask of samples (B, S)."""
        lengths = self._get_feat_extract_output_lengths(attention_mask.long().sum(dim=1))
        return torch.arange(frames, device=attention_mask.device)[None] < lengths[:, None]


class Data2Vec2Model(Data2Vec2PreTrainedModel):
    """The encoder. `last_hidden_state` (B, E + T, D) has extra tokens first (images: the class token);
    `pooler_output` (B, D) is the mean over all real tokens but those."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__(config)
        self.local = {"audio": Waveform, "image": Patches, "text": Tokens}[config.modality](config)
        self.context = Context(config)
        shared = config.num_hidden_layers - config.num_prenet_layers
        self.blocks = nn.ModuleList(Block(config) for _ in range(shared))
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.norm = nn.LayerNorm(dim, eps=eps) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.local.tokens if self.config.modality == "text" else self.local

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.modality == "text":
            self.local.tokens = value
        else:
            self.local = value

    def forward(
        self,
        input_values: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """One of `input_values` (B, S), `pixel_values` (B, 3, H, W), `input_ids` (B, T), as the modality asks.

        `attention_mask`: 1 = real, of the input's shape (audio, text); what it hides changes nothing.
        `hidden_states`: the first layer's input, then every layer's output.
        """
        given = {"audio": input_values, "image": pixel_values, "text": input_ids}
        source = given[self.config.modality]
        if source is None:
            raise ValueError(
                f"this model reads {self.config.modality}: give {self.main_input_name}=..., as its processor does"
            )
        config = self.config
        keeps_all = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        with_weights = config.output_attentions if output_attentions is None else output_attentions
        x = self.local(source)
        padding = self.make_padding(source, attention_mask, x.shape[1])
        x, biases, padding = self.context(x, padding)
        states, attentions = [x], []
        for layer, block in enumerate([*self.context.blocks, *self.blocks]):
            bias = biases[min(layer, len(biases) - 1)] if biases else None
            if self.gradient_checkpointing and self.training:
                x, weights = self._gradient_checkpointing_func(
                    block.__call__, x, bias, padding, bool(with_weights)
                )
            else:
                x, weights = block(x, bias, padding, bool(with_weights))
            states.append(x)
            attentions.append(weights)
        x = self.norm(x)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pool(x, padding),
            hidden_states=tuple(states) if keeps_all else None,
            attentions=tuple(attentions) if with_weights else None,
        )
        return output.to_tuple() if return_dict is False else output

    def make_padding(self, source: Tensor, attention_mask: Tensor | None, tokens: int) -> Tensor | None:
        """Bool (B, T), True = no data here; None if nothing is said to be padded."""
        if self.config.modality == "text":
            padding = source == self.config.pad_token_id
            return padding if attention_mask is None else padding | (attention_mask == 0)
        if attention_mask is None or self.config.modality == "image":
            return None
        return ~self._get_feature_vector_attention_mask(tokens, attention_mask)

    def pool(self, x: Tensor, padding: Tensor | None) -> Tensor:
        x = x[:, self.config.num_extra_tokens :]
        if padding is None:
            return x.mean(dim=1)
        real = (~padding[:, self.config.num_extra_tokens :]).to(x.dtype)[:, :, None]
        return (x * real).sum(dim=1) / real.sum(dim=1)


# ---- heads ----


class CTCHead(nn.Module):
    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ImageHead(nn.Module):
    """Mean over patches, norm, linear."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x.mean(dim=1)))


class SentenceHead(nn.Module):
    """The first token through a linear layer, tanh, and another one."""

    def __init__(self, config: Data2Vec2Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.tanh(self.dense(x[:, 0])))


class Data2Vec2WithHead(Data2Vec2PreTrainedModel):
    """An encoder and a head on its last output without extra tokens."""

    head_class: type[nn.Module]

    def __init__(self, config: Data2Vec2Config):
        super().__init__(config)
        self.encoder = Data2Vec2Model(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.head = self.head_class(config)
        self.post_init()

    def encode(self, **inputs: Any) -> tuple[Tensor, BaseModelOutputWithPooling]:
        """Logits, and what the encoder gave."""
        output = self.encoder(**inputs)
        x = output.last_hidden_state[:, self.config.num_extra_tokens :]
        return self.head(self.dropout(x)), output


class Data2Vec2ForCTC(Data2Vec2WithHead):
    """Letters of speech; `config.pad_token_id` is the blank."""

    head_class = CTCHead

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Logits (B, T, letters). `labels` (B, L), -100 = none: the loss is a mean over sentences."""
        logits, output = self.encode(
            input_values=input_values,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        loss = None if labels is None else self.ctc_loss(logits, labels, input_values, attention_mask)
        result = CausalLMOutput(loss, logits, output.hidden_states, output.attentions)
        return result.to_tuple() if return_dict is False else result

    def ctc_loss(
        self, logits: Tensor, labels: Tensor, input_values: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
        frames = self._get_feat_extract_output_lengths(mask.long().sum(dim=1))
        log_probs = logits.float().log_softmax(dim=-1).transpose(0, 1)  # (T, B, letters)
        is_label = labels >= 0
        total = F.ctc_loss(
            log_probs,
            labels[is_label],
            frames,
            is_label.sum(dim=1),
            blank=self.config.pad_token_id,
            reduction="sum",
            zero_infinity=True,
        )
        return total / len(labels)


class Data2Vec2ForImageClassification(Data2Vec2WithHead):
    head_class = ImageHead

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Logits (B, classes). `labels` (B,): classes."""
        logits, output = self.encode(
            pixel_values=pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        result = ImageClassifierOutput(loss, logits, output.hidden_states, output.attentions)
        return result.to_tuple() if return_dict is False else result


class Data2Vec2ForSequenceClassification(Data2Vec2WithHead):
    head_class = SentenceHead

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Logits (B, classes). `labels` (B,): classes, or numbers if there is one output (regression)."""
        logits, output = self.encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits[:, 0].float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        result = SequenceClassifierOutput(loss, logits, output.hidden_states, output.attentions)
        return result.to_tuple() if return_dict is False else result
