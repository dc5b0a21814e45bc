"""The plans of one model as data: where their bytes are, what they were built for and whether they were verified.

Nothing here imports a TensorRT library or reads a plan before it is asked for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    ProfileSpec,
    SegmentSpec,
    WeightMode,
    plans_of,
    spec_from_dict,
)
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.saved_plans import SavedFile, SavedPlans
from llmengine.dtypes import ModelDType
from llmengine.errors import CorruptFileError

_logger = logging.getLogger("llmengine.tensorrt")

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""Which of NVIDIA's two libraries built a plan; neither runs the other's."""

LIBRARY_CACHE_FILE = "library.cache"


@dataclass(frozen=True, slots=True)
class Producer:
    """What decides, beside the network, whether a plan can be used: library and device.

    Attributes:
        version: of the library, as it names itself.
        target: compute capabilities, never empty.
        device_name: of the GPU on which the library measured; None where building measures nothing.
    """

    flavour: Flavour
    version: str
    target: BuildTarget
    device_name: str | None = None

    def __str__(self) -> str:
        device = "" if self.device_name is None else f" ({self.device_name})"
        return f"{self.flavour} {self.version} for {self.target}{device}"

    def mismatches(self, wanted: Producer) -> list[str]:
        """Return why plans of this producer cannot be used where `wanted` builds; empty if they can."""
        found: list[str] = []
        if self.flavour != wanted.flavour:
            found.append(f"built by {self.flavour}, here is {wanted.flavour}")
        elif self.version != wanted.version:
            found.append(f"built by {self.flavour} {self.version}, here is {wanted.version}")
        if not set(wanted.target.compute_capabilities) <= set(self.target.compute_capabilities):
            found.append(f"built for {self.target}, needed is {wanted.target}")
        elif self.flavour == wanted.flavour and self.device_name != wanted.device_name:
            found.append(f"measured on {self.device_name!r}, here is {wanted.device_name!r}")
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """One serialized engine.

    Attributes:
        build_s: seconds that the build took.
        peak_host_bytes: most memory that the building process held; None where the system does not tell.
    """

    file: SavedFile
    build_s: float
    peak_host_bytes: int | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the plan."""
        return self.file.size_bytes

    def read(self) -> bytes:
        """Return the plan; raises `CorruptFileError` naming the file, what was found and what was expected."""
        return self.file.read()


@dataclass(frozen=True, slots=True)
class PlanSet:
    """What a runner needs to run a model's segments.

    Attributes:
        segments: in the order in which they run.
        plans: plan name (`PlacedSegment.plan_name`) -> plan; exactly those that `segments` name. Not by fingerprint:
            plans with constants differ although their networks are defined alike.
        verification: what verifying the plans on a device found, JSON-ready; None: not done.
        library_cache: what makes the next start faster and may be lost at any time: the timing cache of
            `tensorrt`, the runtime cache of `tensorrt_rtx`.
    """

    producer: Producer
    segments: tuple[PlacedSegment, ...]
    plans: Mapping[str, Plan]
    verification: Mapping[str, Any] | None = None
    library_cache: bytes | None = None

    def __post_init__(self) -> None:
        assert set(self.plans) == set(plans_of(self.segments)), "a plan for each segment, and no other"

    def plan_of(self, segment: PlacedSegment) -> Plan:
        """Return the plan that runs `segment`."""
        return self.plans[segment.plan_name]

    @property
    def size_bytes(self) -> int:
        """Bytes of all plans."""
        return sum(plan.size_bytes for plan in self.plans.values())

    def replace(self, **changes: Any) -> PlanSet:
        """Return a copy with `changes`, such as `verification=...`."""
        return dataclasses.replace(self, **changes)

    def to_saved(self) -> SavedPlans:
        """Return the form that an engine directory keeps; `SavedSet.read` reads it."""
        specs = {name: segment.spec for name, segment in plans_of(self.segments).items()}
        files = {plan_file(name): plan.file for name, plan in self.plans.items()}
        if self.library_cache is not None:
            files[LIBRARY_CACHE_FILE] = SavedFile.of(self.library_cache)
        facts = {
            "flavour": self.producer.flavour,
            "version": self.producer.version,
            "compute_capabilities": list(self.producer.target.compute_capabilities),
            "device_name": self.producer.device_name,
            "verification": None if self.verification is None else dict(self.verification),
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
class SavedSet:
    """The plans of an engine directory; whether they fit, and whether their files are whole, is not known yet.

    Attributes:
        fingerprints: plan name -> fingerprint of the network that the plan was built from.
        specs: plan name -> that network.
    """

    producer: Producer
    plans: Mapping[str, Plan]
    fingerprints: Mapping[str, str]
    specs: Mapping[str, SegmentSpec]
    verification: Mapping[str, Any] | None
    library_cache: SavedFile | None

    @classmethod
    def read(cls, saved: SavedPlans, where: str) -> SavedSet:
        """Return the plans that `PlanSet.to_saved` described; raises `CorruptFileError` beginning with `where`."""
        facts = Fields(saved.facts, where)
        keys = {"flavour", "version", "compute_capabilities", "device_name", "verification", "plans"}
        facts.require_only(keys)
        flavour = facts.string("flavour")
        if flavour not in get_args(Flavour):
            raise facts.error("flavour", f"one of {', '.join(get_args(Flavour))}")
        target = BuildTarget(facts.sizes("compute_capabilities"))
        device_name = facts.string("device_name") if facts.has("device_name") else None
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
            Producer(cast(Flavour, flavour), facts.string("version"), target, device_name),
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
        """How the plans have their weights."""
        return next(iter(self.specs.values())).weight_mode

    @property
    def dtype(self) -> ModelDType:
        """Of activations and weights."""
        return next(iter(self.specs.values())).dtype

    def read_library_cache(self) -> bytes | None:
        """Return the library's cache, None if there is none that is whole."""
        try:
            return self.library_cache.read() if self.library_cache is not None else None
        except CorruptFileError as error:
            _logger.warning("the library's cache is not used: %s", error)
            return None


def plan_file(name: str) -> str:
    """Return the name of a plan's file."""
    return f"{name}.plan"


def _read_spec(entry: Fields) -> SegmentSpec:
    try:
        return spec_from_dict(entry.fields("segment").values)
    except CorruptFileError as error:
        raise CorruptFileError(f"{entry.where}: segment: {error}") from error
