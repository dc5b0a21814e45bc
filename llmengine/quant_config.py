"""`QuantConfig`: what is quantized, to which format and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from llmengine.checks import requirement
from llmengine.errors import ConfigError
from llmengine.settings import Settings, require_bool, require_choice, require_int, require_number

WeightQuantization = Literal["none", "stored", "int8", "int4", "fp8", "mxfp4"]
ActivationQuantization = Literal["none", "token", "tensor"]
ScaleSharing = Literal["tensor", "channel", "group", "block"]
QuantMethod = Literal["rtn", "awq", "gptq", "smoothquant"]
KvQuantization = Literal["none", "int8", "fp8"]
PresetName = Literal[
    "stored",
    "int8",
    "int4-rtn",
    "int4-awq",
    "int4-gptq",
    "w8a8",
    "fp8",
    "fp8-gptq",
    "fp8-block",
    "fp8-block-gptq",
    "mxfp4",
    "mxfp4-gptq",
]

GROUP_SIZES = (16, 32, 64, 128)

PRESETS: Mapping[PresetName, Mapping[str, Any]] = {
    "stored": {"weights": "stored"},
    "int8": {"weights": "int8"},
    "int4-rtn": {"weights": "int4", "method": "rtn"},
    "int4-awq": {"weights": "int4", "method": "awq"},
    "int4-gptq": {"weights": "int4", "method": "gptq"},
    "w8a8": {"weights": "int8", "activations": "token", "method": "smoothquant"},
    "fp8": {"weights": "fp8", "activations": "token"},
    "fp8-gptq": {"weights": "fp8", "activations": "token", "method": "gptq"},
    "fp8-block": {"weights": "fp8", "scales": "block", "activations": "token"},
    "fp8-block-gptq": {"weights": "fp8", "scales": "block", "activations": "token", "method": "gptq"},
    "mxfp4": {"weights": "mxfp4"},
    "mxfp4-gptq": {"weights": "mxfp4", "method": "gptq"},
}
"""Settings of `QuantConfig` by a name; the other settings have their defaults."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What goes with a number format of weights and whether activations are quantized; the defaults come first."""

    scales: tuple[ScaleSharing, ...]
    activations: tuple[ActivationQuantization, ...]
    methods: tuple[QuantMethod, ...]


_WEIGHTS_ONLY: Mapping[str, _Kind] = {
    "none": _Kind((), ("none",), ()),
    "stored": _Kind((), ("none",), ()),
    "int8": _Kind(("channel",), ("none",), ("rtn",)),
    "int4": _Kind(("group", "channel"), ("none",), ("awq", "gptq", "rtn")),
    "fp8": _Kind(("channel", "tensor", "block"), ("none",), ("rtn", "gptq")),
    "mxfp4": _Kind(("block",), ("none",), ("rtn", "gptq")),
}
_WITH_ACTIVATIONS: Mapping[str, _Kind] = {
    "int8": _Kind(("channel", "tensor"), ("token", "tensor"), ("smoothquant", "rtn")),
    "fp8": _Kind(("channel", "tensor", "block"), ("token",), ("rtn", "gptq")),
}


@dataclass(slots=True)
class QuantConfig(Settings):
    """What is quantized, to which format, and how; docs/quantization.md says how to choose.

    It applies to models that are not quantized yet; those that are stay as they are.

    Attributes:
        weights: the number format of weights: "none" (they are not quantized), "int8", "int4", "fp8" (e4m3) or
            "mxfp4". "stored": as "none", and all quantized matrices of a GGUF file stay as they are, whatever `dtype`
            says, on a CPU also those that are faster dequantized. The other formats quantize a GGUF file again.
        group_size: weights of a row that share a scale, for scales="group": 16, 32, 64 or 128.
        max_perplexity_increase: most that quantizing may raise the perplexity of the package's evaluation text: 0.01 is
            1 %. It is measured when the model is quantized, against the unquantized model, which is loaded for that;
            `QualityError` is raised where it is exceeded. None: not measured.
        scales: weights that share a scale: all of a matrix ("tensor"), those of a row ("channel"), `group_size` of a
            row ("group"), or a block of the format's own size ("block"). None: "group" for int4, "block" for mxfp4,
            else "channel".
        symmetric: int4 groups have no zero points.
        activations: "token" rounds the activations before each product to the number format of the weights as well,
            each token with a scale of its own; "tensor": with a calibrated scale for all (int8 only).
        method: how values are chosen. "rtn": each is rounded to the nearest, without data. "awq" (int4), "gptq" (int4,
            fp8, mxfp4) and "smoothquant" (int8 with activations) calibrate on texts. None: "awq" for int4 in groups,
            "smoothquant" for int8 with activations, else "rtn".
        kv_cache: the number format of keys and values in the cache, of any model: "none" (as the device computes them),
            "int8" or "fp8" (e4m3), with a scale for each token and head.
        skip_layers: names of matrices that are not quantized, or patterns of them: "lm_head", "layers.0.*", "*.down".
            A layer has the matrices qkv, o, gate_up and down.
        calibration_prompts: texts, chats (lists of messages) or token ids that calibrating computes activations of.
            None: the package's texts and chats.
        num_calibration_samples: samples of up to 512 tokens that are taken from them; longer prompts give several.
        calibration_seed: chooses among them.
    """

    weights: WeightQuantization = "none"
    group_size: int = 128
    max_perplexity_increase: float | None = None
    scales: ScaleSharing | None = None
    symmetric: bool = False
    activations: ActivationQuantization = "none"
    method: QuantMethod | None = None
    kv_cache: KvQuantization = "none"
    skip_layers: Sequence[str] = ()
    calibration_prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]] | None = None
    num_calibration_samples: int = 128
    calibration_seed: int = 0

    @classmethod
    def preset(cls, name: PresetName, **changes: Any) -> Self:
        """The configuration of a name in `PRESETS`, with other values for some fields.

        Raises `ConfigError` for another name.
        """
        require_choice("quant", name, get_args(PresetName))
        return cls(**{**PRESETS[name], **changes})

    def init_from_description(
        self,
        quantize_weights: bool = False,
        quantize_activations: bool = False,
        per_token: bool = False,
        per_channel: bool = False,
        per_group: bool = False,
        use_int4_weights: bool = False,
        use_int8_kv_cache: bool = False,
        use_fp8_kv_cache: bool = False,
        use_fp8_qdq: bool = False,
        group_size: int = 128,
    ) -> None:
        """Set weights, scales, activations, method, KV cache and group size from flags; other fields stay.

        The flags mean what those of TensorRT-LLM's `QuantMode.from_description` mean. FP8 activations get a scale for
        each token at run time, where TensorRT-LLM calibrates one for all.

        Raises `ConfigError` for combinations that no format has.
        """
        flags = {name: value for name, value in locals().items() if name not in ("self", "group_size")}
        for name, value in flags.items():
            require_bool(name, value)
        on = {name for name, value in flags.items() if value}
        for flag, excluded, reason in _EXCLUDED:
            if flag in on and (both := on & excluded):
                raise ConfigError(f"{flag}=True excludes {_listed(both)}: {reason}")
        for flag, needed in _NEEDED:
            if flag in on and not on & needed:
                raise ConfigError(f"{flag}=True needs {_listed(needed, ' or ')}")
        if use_fp8_qdq and per_channel != per_token:
            raise ConfigError("use_fp8_qdq=True needs both per_channel=True and per_token=True, or neither")
        self.weights = "fp8" if use_fp8_qdq else "int4" if use_int4_weights else "int8" if quantize_weights else "none"
        self.scales = None
        if use_int4_weights:
            self.scales = "group" if per_group else "channel"
        elif (quantize_activations or use_fp8_qdq) and not per_channel:
            self.scales = "tensor"
        self.activations = "none"
        if use_fp8_qdq or quantize_activations:
            self.activations = "token" if per_token or use_fp8_qdq else "tensor"
        self.method = None
        self.kv_cache = "int8" if use_int8_kv_cache else "fp8" if use_fp8_kv_cache else "none"
        self.group_size = group_size

    def resolve(self) -> Self:
        """A checked, frozen copy in which the defaults of the format replace None in `scales` and `method`."""
        require_choice("quant_config.weights", self.weights, get_args(WeightQuantization))
        require_choice("quant_config.activations", self.activations, get_args(ActivationQuantization))
        kind = (_WEIGHTS_ONLY if self.activations == "none" else _WITH_ACTIVATIONS).get(self.weights)
        if kind is None:
            raise ConfigError(
                f"quant_config.activations={self.activations!r} is not available with weights={self.weights!r}; "
                f"available with: {', '.join(map(repr, _WITH_ACTIVATIONS))}"
            )
        scales, method = self.scales, self.method
        if kind.methods:
            scales = scales or kind.scales[0]
            # Per row there is nothing for AWQ to choose.
            method = method or ("rtn" if (self.weights, scales) == ("int4", "channel") else kind.methods[0])
        for name, value, allowed in (
            ("scales", scales, kind.scales),
            ("activations", self.activations, kind.activations),
            ("method", method, kind.methods),
        ):
            if value is not None and value not in allowed:
                self._refuse(name, value, allowed)
        prompts = self.calibration_prompts
        resolved = dataclasses.replace(
            self,
            scales=scales,
            method=method,
            skip_layers=_texts("quant_config.skip_layers", self.skip_layers),
            calibration_prompts=None if prompts is None else _prompts(prompts),
        )
        # Not super(): a dataclass with slots is another class than the one that this function was defined in.
        return Settings.resolve(resolved)

    def _refuse(self, name: str, value: object, allowed: tuple[str, ...]) -> None:
        what = f"weights={self.weights!r}"
        if name != "activations" and self.activations != "none":
            what += f" and activations={self.activations!r}"
        listed = ", ".join(map(repr, allowed)) or "None"
        raise ConfigError(f"quant_config.{name}={value!r} is not available with {what}; available: {listed}")

    def _check(self) -> None:
        if self.group_size not in GROUP_SIZES:
            listed = ", ".join(map(str, GROUP_SIZES))
            raise requirement(ConfigError, "quant_config.group_size", f"one of {listed}", self.group_size)
        require_choice("quant_config.kv_cache", self.kv_cache, get_args(KvQuantization))
        require_bool("quant_config.symmetric", self.symmetric)
        require_int("quant_config.num_calibration_samples", self.num_calibration_samples, 1)
        require_int("quant_config.calibration_seed", self.calibration_seed, 0)
        if self.max_perplexity_increase is not None:
            require_number("quant_config.max_perplexity_increase", self.max_perplexity_increase, 0.0)


_EXCLUDED = (
    ("use_fp8_qdq", {"use_int4_weights", "per_group"}, "FP8 weights have 8 bits and no groups"),
    ("use_int4_weights", {"quantize_activations"}, "INT4 is for weights only"),
    ("use_int4_weights", {"per_channel", "per_token"}, "INT4 has a scale for each group (per_group) or each row"),
    ("use_int8_kv_cache", {"use_fp8_kv_cache"}, "the KV cache has one format"),
)
"""Flag, flags that do not go with it, why."""

_NEEDED = (
    ("quantize_activations", {"quantize_weights", "use_fp8_qdq"}),
    ("use_int4_weights", {"quantize_weights"}),
    ("per_group", {"use_int4_weights"}),
    ("per_channel", {"quantize_weights", "use_fp8_qdq"}),
    ("per_token", {"quantize_activations", "use_fp8_qdq"}),
)
"""Flag, flags of which it needs one."""


def _listed(flags: set[str], separator: str = ", ") -> str:
    return separator.join(f"{name}=True" for name in sorted(flags))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise requirement(ConfigError, name, "a sequence of strings", value)
    for index, item in enumerate(value):
        if not isinstance(item, str) or not item:
            raise requirement(ConfigError, f"{name}[{index}]", "a non-empty string", item)
    return tuple(value)


def _prompts(value: Any) -> tuple[Any, ...]:
    """Texts, chats or token ids, copied. Raises `ConfigError` for anything else, and for a mixture."""
    name, kinds = "quant_config.calibration_prompts", "texts, of chats (lists of messages) or of sequences of token ids"
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise requirement(ConfigError, name, f"a non-empty sequence of {kinds}", value)
    if any(isinstance(item, str) for item in value):
        return _texts(name, value)
    kind: type[Any] = (
        Mapping if isinstance(value[0], Sequence) and isinstance(next(iter(value[0]), 0), Mapping) else int
    )
    expected = "a chat: a non-empty list of messages" if kind is Mapping else "a non-empty sequence of token ids"
    for index, item in enumerate(value):
        is_kind = isinstance(item, Sequence) and item and not isinstance(item, str)
        if not is_kind or not all(isinstance(part, kind) and not isinstance(part, bool) for part in item):
            raise requirement(ConfigError, f"{name}[{index}]", expected, item)
    return tuple(tuple(item) for item in value)
