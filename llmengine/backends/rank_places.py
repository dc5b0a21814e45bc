"""Where the parts of a model are: which stage of its layers each rank has, and which shard of that."""

from __future__ import annotations

from collections.abc import Sequence

from llmengine.checkpoints.sharded_source import ShardPlan, shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.checkpoints.stage_source import plan_stages, stage_source
from llmengine.config import ParallelConfig
from llmengine.models.arch import ModelArch
from llmengine.models.sharding import Shard
from llmengine.models.stages import Stage


class RankPlaces:
    """The parts of the model `source`. Rank = pp_rank * tp_size + tp_rank, where pp_rank 0 has the last stage."""

    def __init__(self, config: ParallelConfig, source: ModelSource) -> None:
        """Raises `ConfigError` for a model that cannot be divided so."""
        self.tp_size, self.pp_size = config.tp_size, config.pp_size
        self.size = self.tp_size * self.pp_size
        self.source = source
        self.stages: Sequence[Stage] = plan_stages(source, self.pp_size)
        sources = [stage_source(source, stage) for stage in self.stages]
        self.plans = [ShardPlan(own.arch, own.formats, self.tp_size) for own in sources]

    def stage_of(self, rank: int) -> Stage:
        """The stage of a rank: the last for rank 0's group, and for the others, in their order, from the first on."""
        return self.stages[rank // self.tp_size - 1]

    def plan_of(self, rank: int) -> ShardPlan:
        """How the stage of a rank is divided."""
        return self.plans[self.stage_of(rank).index]

    def shard_of(self, rank: int) -> Shard:
        """The part that a rank has of each matrix of its stage."""
        return Shard(rank % self.tp_size, self.tp_size)

    def arch_of(self, rank: int) -> ModelArch:
        """The model that a rank runs."""
        return self.plan_of(rank).arch_of(rank % self.tp_size)

    def source_of(self, rank: int) -> ModelSource:
        """The weights of that model."""
        return shard_source(stage_source(self.source, self.stage_of(rank)), self.shard_of(rank))

    def describe(self, each: str) -> str:
        """How the model is divided, for people; `each` says how the ranks of a stage share it, if there are several."""
        if self.pp_size == 1:
            return each
        *most, last = [str(len(stage.layers)) for stage in self.stages]
        stages = f"{self.pp_size} stages of {', '.join(most)} and {last} layers"
        return stages if self.tp_size == 1 else f"{stages}, in each of which {each}"
