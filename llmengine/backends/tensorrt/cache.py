"""The cache of the plans that this machine has built.

It is a directory of files that appear by renaming, so processes may share it and be killed at any time::

    {key}.json        the plan of a key, and what building it took; the key covers everything the plan depends on
    {sha256}.plan     a plan, named by its contents
    {set}.*.set.json  the verification of a set of plans on this machine, for each version of the criterion
    {set}.cache       the library's own cache for that set
    timing-*.cache    measurements of a library, for its next builds
    build-*/          files of a build in progress
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmengine.backends.tensorrt import criterion
from llmengine.backends.tensorrt.builder import BuiltPlan
from llmengine.backends.tensorrt.plan_set import Plan, PlanSet, Producer
from llmengine.backends.tensorrt.spec import SegmentSpec
from llmengine.checkpoints.metadata_fields import read_json_object
from llmengine.checkpoints.saved_files import SavedFile
from llmengine.errors import CorruptFileError, EngineError
from llmengine.user_cache import cache_dir

_logger = logging.getLogger("llmengine.tensorrt")

LIMIT_BYTES = 32 << 30
"""A build that makes the cache larger than this removes the least recently used files."""

_KEY_VERSION = 2
_SEAL = "entry_sha256"
_STALE_BUILD_S = 24 * 3600.0


def plan_key(spec: SegmentSpec, producer: Producer, constants_sha256: str | None) -> str:
    """Key of a plan: the sha256 (hex) of everything that decides what it computes and where it runs.

    Args:
        constants_sha256: of the weights that the plan contains; None if it contains none.
    """
    content = {
        "key_version": _KEY_VERSION,
        "fingerprint": spec.fingerprint(),
        "flavour": producer.flavour,
        "version": producer.version,
        "compute_capabilities": list(producer.target.compute_capabilities),
        "device_name": producer.device_name,
        "constants_sha256": constants_sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class PlanCache:
    """The cache in one directory. If the directory cannot be written, a warning says so and nothing is kept.

    Args:
        directory: None: "plans" in the user's cache directory.
        limit_bytes: see `LIMIT_BYTES`.
    """

    def __init__(self, directory: Path | None = None, limit_bytes: int = LIMIT_BYTES) -> None:
        self._directory = directory or cache_dir() / "plans"
        self._limit_bytes = limit_bytes

    def find(self, key: str) -> Plan | None:
        """The plan of a key, None if there is none or it is damaged."""
        entry = self._directory / f"{key}.json"
        if not entry.exists():
            return None
        try:
            fields = read_json_object(entry)
            if fields.values.get(_SEAL) != _seal(key, fields.values):
                raise CorruptFileError(f"{entry}: does not match its key")
            peak = fields.integer("peak_host_bytes") if fields.has("peak_host_bytes") else None
            sha256 = fields.string("sha256")
            path = self._directory / f"{sha256}.plan"
            file = SavedFile(path, fields.integer("size_bytes"), sha256)
            file.check()
            with contextlib.suppress(OSError):  # the times of use do not matter in a cache that cannot be written
                for used in (entry, path):
                    os.utime(used)
            return Plan(file, fields.number("build_s"), peak)
        except (EngineError, OSError) as error:
            _logger.warning("a cached plan is ignored: %s", error)
            return None

    def store(self, key: str, built: BuiltPlan) -> Plan:
        """Move a built plan into the cache and return it; one that cannot be stored is held in memory."""
        with built.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        path = self._directory / f"{sha256}.plan"
        facts = {
            "sha256": sha256,
            "size_bytes": built.size_bytes,
            "build_s": built.seconds,
            "peak_host_bytes": built.peak_host_bytes,
        }
        kept = SavedFile(path, built.size_bytes, sha256)
        try:
            os.replace(built.path, path)
        except OSError as error:
            self._warn(f"plan {built.name!r}", error)
            kept = SavedFile.of(built.path.read_bytes())
        else:
            self._write(f"{key}.json", json.dumps({**facts, _SEAL: _seal(key, facts)}).encode())
        return Plan(kept, built.seconds, built.peak_host_bytes)

    def store_findings(self, plan_set: PlanSet) -> None:
        """Keep the set's verification and library cache for the next process that uses the same plans."""
        name = _set_name(plan_set)
        if plan_set.library_cache is not None and self.timing_file(plan_set.producer) is None:
            self._write(f"{name}.cache", plan_set.library_cache)
        if plan_set.verification is not None:
            self._write(_verification_file(name), json.dumps({"verification": dict(plan_set.verification)}).encode())

    def with_findings(self, plan_set: PlanSet) -> PlanSet:
        """The set with what `store_findings` kept for its plans, if anything."""
        name = _set_name(plan_set)
        verification, library_cache = plan_set.verification, plan_set.library_cache
        with contextlib.suppress(EngineError):
            fields = read_json_object(self._directory / _verification_file(name)).fields("verification")
            verification = dict(fields.values)
        with contextlib.suppress(OSError):
            library_cache = (self.timing_file(plan_set.producer) or self._directory / f"{name}.cache").read_bytes()
        return plan_set.replace(verification=verification, library_cache=library_cache)

    def timing_file(self, producer: Producer) -> Path | None:
        """File of the library's measurements on the device; None if it measures nothing or they cannot be kept."""
        if producer.device_name is None or not os.access(self._directory, os.W_OK):
            return None
        name = re.sub(r"[^A-Za-z0-9.+-]+", "_", f"{producer.flavour}-{producer.version}-{producer.device_name}")
        return self._directory / f"timing-{name}.cache"

    def seed_timings(self, producer: Producer, content: bytes | None) -> None:
        """Keep the measurements of a saved engine, unless there are some already."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
        file = self.timing_file(producer)
        if content is not None and file is not None and not file.exists():
            self._write(file.name, content)

    @contextmanager
    def build_directory(self) -> Iterator[Path]:
        """An empty directory for a build in progress, in the cache if that can be written; removed at the end.

        Directories of killed builds are removed a day later. Raises `EngineError` if no directory can be created.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for left in self._directory.glob("build-*"):
                if _age_s(left) > _STALE_BUILD_S:
                    shutil.rmtree(left, ignore_errors=True)
            directory = tempfile.mkdtemp(prefix="build-", dir=self._directory)
        except OSError as error:
            self._warn("the plans of this build", error)
            try:
                directory = tempfile.mkdtemp(prefix="llmengine-build-")
            except OSError as failure:
                raise EngineError(f"no directory for building plans: {failure.strerror or failure}") from failure
        try:
            yield Path(directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def trim(self, plan_set: PlanSet) -> None:
        """Remove the least recently used files while the cache is larger than its limit, but no plan of `plan_set`."""
        needed = {f"{plan.file.sha256}.plan" for plan in plan_set.plans.values()}
        try:
            files = [path for path in self._directory.iterdir() if path.is_file()]
            sizes = {path: path.stat() for path in files}
        except OSError:
            return  # another process removes files too, or there is no cache
        total = sum(size.st_size for size in sizes.values())
        for path in sorted(files, key=lambda path: sizes[path].st_mtime):
            if total <= self._limit_bytes:
                return
            if path.name not in needed:
                with contextlib.suppress(OSError):  # another process has removed it, or it must not be removed
                    path.unlink()
                total -= sizes[path].st_size

    def _write(self, name: str, content: bytes) -> None:
        """Write a file that is there complete or not at all."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="build-", dir=self._directory) as scratch:
                (Path(scratch) / name).write_bytes(content)
                os.replace(Path(scratch) / name, self._directory / name)
        except OSError as error:
            self._warn(name, error)

    def _warn(self, what: str, error: OSError) -> None:
        _logger.warning("%s cannot be cached in %s: %s", what, self._directory, error.strerror or error)


def _seal(key: str, facts: Mapping[str, Any]) -> str:
    """The hash (hex) that ties an entry to its key. Without it an altered entry could name another, undamaged plan."""
    content = [key, {name: value for name, value in facts.items() if name != _SEAL}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _set_name(plan_set: PlanSet) -> str:
    content = {name: plan.file.sha256 for name, plan in plan_set.plans.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verification_file(set_name: str) -> str:
    """Name of a file that versions of the package with another criterion neither read nor replace."""
    return f"{set_name}.{criterion.VERSION}.set.json"


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
