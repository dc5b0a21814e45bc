"""The plans of one model as data: where their bytes are, what they were built for and whether they were verified.

Nothing here imports a TensorRT library, and a plan's bytes are read only when they are asked for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from llmengine.backends.tensorrt.library import Flavour
from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    ProfileSpec,
    SegmentSpec,
    WeightMode,
    segments_by_plan,
    spec_from_dict,
)
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.saved_files import SavedFile, SavedPlans
from llmengine.dtypes import ModelDType
from llmengine.errors import CorruptFileError

_logger = logging.getLogger("llmengine.tensorrt")

LIBRARY_CACHE_FILE = "library.cache"


@dataclass(frozen=True, slots=True)
class Producer:
    """Library and devices of a plan, which decide, beside the network, whether it can be used.

    Attributes:
        version: the library's name for its own version.
        target: compute capabilities, never empty.
        device_name: the GPU on which the library measured; None for a library whose builds measure nothing.
    """

    flavour: Flavour
    version: str
    target: BuildTarget
    device_name: str | None = None

    def __str__(self) -> str:
        device = "" if self.device_name is None else f" ({self.device_name})"
        return f"{self.flavour} {self.version} for {self.target}{device}"

    def mismatches(self, needed: Producer) -> list[str]:
        """Reasons why plans of this producer cannot replace those of `needed`; empty if they can."""
        reasons: list[str] = []
        if self.flavour != needed.flavour:
            reasons.append(f"they were built by {self.flavour}, and {needed.flavour} is installed here")
        elif self.version != needed.version:
            reasons.append(f"they were built by {self.flavour} {self.version}, and {needed.version} is installed here")
        if not set(needed.target.compute_capabilities) <= set(self.target.compute_capabilities):
            reasons.append(f"they were built for {self.target}, not for {needed.target}")
        elif self.flavour == needed.flavour and self.device_name != needed.device_name:
            reasons.append(f"they were measured on {self.device_name!r}, and the GPU here is {needed.device_name!r}")
        return reasons


@dataclass(frozen=True, slots=True)
class Plan:
    """One serialized engine.

    Attributes:
        build_s: seconds that the build took.
        peak_host_bytes: peak memory of the building process; None where the system does not report it.
    """

    file: SavedFile
    build_s: float
    peak_host_bytes: int | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the plan."""
        return self.file.size_bytes

    def read(self) -> bytes:
        """The plan's bytes; raises `CorruptFileError` naming the file, what was found and what was expected."""
        return self.file.read()


@dataclass(frozen=True, slots=True)
class PlanSet:
    """The plans of a model, complete.

    Attributes:
        segments: in the order in which they run; of a model that ranks share, those of rank 0, of rank 1 and so on.
        plans: plan name (`PlacedSegment.plan_name`) -> plan, for exactly the plans of `segments`. The key is not the
            fingerprint, because plans with constants differ although their networks are defined alike.
        verification: `Verification.to_dict()` of these plans; None: not verified.
        library_cache: content that makes the next start faster and may be lost at any time: the timing cache of
            `tensorrt`, the runtime cache of `tensorrt_rtx`.
    """

    producer: Producer
    segments: tuple[PlacedSegment, ...]
    plans: Mapping[str, Plan]
    verification: Mapping[str, Any] | None = None
    library_cache: bytes | None = None

    def __post_init__(self) -> None:
        assert set(self.plans) == set(segments_by_plan(self.segments)), "a plan for each segment, and no other"

    @property
    def tp_size(self) -> int:
        """How many ranks share the model."""
        return self.segments[-1].rank + 1

    def of_rank(self, rank: int) -> PlanSet:
        """What one rank runs, with the findings about all plans."""
        segments = tuple(segment for segment in self.segments if segment.rank == rank)
        return self.replace(segments=segments, plans={name: self.plans[name] for name in segments_by_plan(segments)})

    @property
    def has_constants(self) -> bool:
        """Whether plans contain weights."""
        return any(segment.spec.constant_weights for segment in self.segments)

    @property
    def size_bytes(self) -> int:
        """Bytes of all plans."""
        return sum(plan.size_bytes for plan in self.plans.values())

    def replace(self, **changes: Any) -> PlanSet:
        """A copy with `changes`, such as `verification=...`."""
        return dataclasses.replace(self, **changes)

    def to_saved(self) -> SavedPlans:
        """The form that an engine directory keeps; `SavedPlanSet.read` reads it."""
        specs = {name: segment.spec for name, segment in segments_by_plan(self.segments).items()}
        files = {plan_file(name): plan.file for name, plan in self.plans.items()}
        if self.library_cache is not None:
            files[LIBRARY_CACHE_FILE] = SavedFile.of(self.library_cache)
        facts = {
            "flavour": self.producer.flavour,
            "version": self.producer.version,
            "compute_capabilities": list(self.producer.target.compute_capabilities),
            "device_name": self.producer.device_name,
            "verification": None if self.verification is None else dict(self.verification),
            **({"tp_size": self.tp_size} if self.tp_size > 1 else {}),
            "plans": {
                name: {
                    "fingerprint": specs[name].fingerprint(),
                    "build_s": round(plan.build_s, 3),
                    "peak_host_bytes": plan.peak_host_bytes,
                    "segment": specs[name].to_dict(),
                }
                for name, plan in self.plans.items()
            },
        }
        return SavedPlans(facts, files)


@dataclass(frozen=True, slots=True)
class SavedPlanSet:
    """The plans of an engine directory, not yet compared with what is needed, their files not yet checked.

    Attributes:
        tp_size: ranks that they were built for.
        fingerprints: plan name -> fingerprint of the network that the plan was built from.
        specs: plan name -> that network.
    """

    producer: Producer
    tp_size: int
    plans: Mapping[str, Plan]
    fingerprints: Mapping[str, str]
    specs: Mapping[str, SegmentSpec]
    verification: Mapping[str, Any] | None
    library_cache: SavedFile | None

    @classmethod
    def read(cls, saved: SavedPlans, where: str) -> SavedPlanSet:
        """The plans that `PlanSet.to_saved` described; raises `CorruptFileError` beginning with `where`."""
        facts = Fields(saved.facts, where)
        expected = {"flavour", "version", "compute_capabilities", "device_name", "verification", "plans"}
        facts.require_only({*expected, "tp_size"} if facts.has("tp_size") else expected)
        table = facts.fields("plans")
        if not table.values:
            raise facts.error("plans", "at least one plan")
        plans, fingerprints, specs = {}, {}, {}
        for name in table.values:
            entry = table.fields(name)
            entry.require_only({"fingerprint", "build_s", "peak_host_bytes", "segment"})
            if plan_file(name) not in saved.files:
                raise table.error(name, f"a plan whose file {plan_file(name)} is listed")
            peak = entry.integer("peak_host_bytes") if entry.has("peak_host_bytes") else None
            plans[name] = Plan(saved.files[plan_file(name)], entry.number("build_s"), peak)
            fingerprints[name] = entry.string("fingerprint")
            specs[name] = _read_spec(entry)
        return cls(
            _read_producer(facts),
            facts.integer("tp_size", low=2) if facts.has("tp_size") else 1,
            plans,
            fingerprints,
            specs,
            dict(facts.fields("verification").values) if facts.has("verification") else None,
            saved.files.get(LIBRARY_CACHE_FILE),
        )

    @property
    def profiles(self) -> tuple[ProfileSpec, ...]:
        """The profiles, which all plans share; empty if they do not."""
        found = {spec.profiles for spec in self.specs.values()}
        return found.pop() if len(found) == 1 else ()

    @property
    def weight_mode(self) -> WeightMode:
        """Whether the plans' weights are inputs or constants."""
        return next(iter(self.specs.values())).weight_mode

    @property
    def dtype(self) -> ModelDType:
        """The dtype of activations and weights."""
        return next(iter(self.specs.values())).dtype

    def read_library_cache(self) -> bytes | None:
        """The library's cache, None if there is none or it is damaged."""
        try:
            return self.library_cache.read() if self.library_cache is not None else None
        except CorruptFileError as error:
            _logger.warning("the library's cache is ignored: %s", error)
            return None

    def usable_plans(self, needed: Mapping[str, PlacedSegment]) -> tuple[dict[str, Plan], list[str]]:
        """The plans that are built from the needed networks and whole, and the reasons why others are not usable.

        Args:
            needed: plan name -> segment.
        """
        usable, reasons = {}, []
        for name, segment in needed.items():
            if name not in self.plans:
                reasons.append(f"plan {name!r} is missing")
            elif self.fingerprints[name] != segment.spec.fingerprint():
                reasons.append(f"plan {name!r} was built from another network than this version of llmengine defines")
            else:
                try:
                    self.plans[name].file.check()
                    usable[name] = self.plans[name]
                except CorruptFileError as error:
                    reasons.append(str(error))
        return usable, reasons


def plan_file(name: str) -> str:
    """File name of a plan in an engine directory."""
    return f"{name}.plan"


def _read_producer(facts: Fields) -> Producer:
    flavour = facts.string("flavour")
    if flavour not in get_args(Flavour):
        raise facts.error("flavour", f"one of {', '.join(get_args(Flavour))}")
    device_name = facts.string("device_name") if facts.has("device_name") else None
    target = BuildTarget(facts.sizes("compute_capabilities"))
    return Producer(cast(Flavour, flavour), facts.string("version"), target, device_name)


def _read_spec(entry: Fields) -> SegmentSpec:
    try:
        return spec_from_dict(entry.fields("segment").values)
    except CorruptFileError as error:
        raise CorruptFileError(f"{entry.where}: segment: {error}") from error
