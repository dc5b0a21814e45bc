"""Parts of a cluster die under load, one after the other; every stream must end well, and nothing may be left.

    python -m benchmarks.cluster_kills --kills 300                     replicas that are threads of this process
    python -m benchmarks.cluster_kills --kills 300 --where processes   replicas that are processes, killed by signals
    python -m benchmarks.cluster_kills --kills 50 --where ray          replicas that are actors of Ray, likewise

Clients run requests all the while. Each stream must bring the tokens that it brings without any cluster, or its
beginning and then one of llmengine's errors, within `--bound` seconds. After each kill the cluster must be whole again
before the next. What is killed, and when, follows from `--seed`; the replicas' backends are fakes.

    replica     a replica's connection breaks, as that of a killed actor does; elsewhere: SIGKILL
    rank        a step of a replica's backend raises, as when one of its ranks has died
    node        half of the replicas at once
    silence     a replica says nothing any more; elsewhere: SIGSTOP
    connection  all replicas at once, and the next one cannot be started
    start       a replica, and then the one that is being started in its place
    removal     a replica that is being removed from the cluster, while it drains
    cluster     the cluster is closed, with no time to drain

The exit code is 1 if a stream ended wrongly or too late, or a thread, process, open file or KV block is left.
"""

from __future__ import annotations

import sys
from typing import get_args

from benchmarks.cluster_kills.runs import Where, kill_all, order_of, table
from benchmarks.report import new_parser


def main() -> None:
    """Print a table."""
    parser = new_parser("cluster_kills", __doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--bound", type=float, default=30.0, help="seconds (default: %(default)s)")
    parser.add_argument("--where", choices=get_args(Where), default="threads", help="what replicas are")
    parser.add_argument("--rerun", action="store_true", help="requests of dead replicas run again")
    arguments = parser.parse_args()
    kills, faults = kill_all(
        order_of(arguments.kills, arguments.seed),
        where=arguments.where,
        bound_s=arguments.bound,
        seed=arguments.seed,
        num_replicas=arguments.replicas,
        num_clients=arguments.clients,
        rerun_requests=arguments.rerun,
    )
    print(table(kills))
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
