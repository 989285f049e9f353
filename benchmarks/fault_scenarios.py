"""Faults of benchmarks/faults.py: the kind, the stage it happens in, and its effect on the plain stack."""

from dataclasses import dataclass, field
from signal import SIGKILL, SIGTERM, Signals

FAULT_STEP = 13


@dataclass(frozen=True)
class Scenario:
    """Fault requested by VQVAE2_FAULT, or a signal, or a signal at the moment of the fault."""

    description: str
    stage: str
    kind: str = ""  # of the fault
    signal: Signals | None = None
    target: str = ""  # kind of process that gets the signal
    step: int = FAULT_STEP  # or part, of the fault
    environment: dict[str, str] = field(default_factory=dict)
    plain_stack: str = ""  # result of Ray Train, DVC and MLflow without this project, where it was measured


SHORT_TIMEOUT = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10"}
MAPPING_STAGES = ("shard", "codes", "sample", "evaluate")
PLAIN_KILL = "goes back from 13 to 5 after 18.6 s"
SCENARIOS = (
    *(
        Scenario("`kill -9` of a worker", stage, "kill", plain_stack=PLAIN_KILL)
        for stage in ("vqvae", "prior_top", "prior_bottom")
    ),
    Scenario("a worker exits", "vqvae", "exit"),
    Scenario("a worker raises an error", "vqvae", "raise"),
    Scenario(
        "a worker hangs, with a timeout of 10 s",
        "vqvae",
        "stop",
        environment=SHORT_TIMEOUT,
        plain_stack="goes back from 13 to 5 after 55.8 s",
    ),
    Scenario("the loss is NaN", "vqvae", "nan"),
    Scenario(
        "the disk is full",
        "vqvae",
        "full",
        plain_stack="no retry; half a checkpoint stays under the name of a complete one",
    ),
    Scenario(
        "SIGTERM to the command, in a step of 5 s",
        "vqvae",
        "slow",
        signal=SIGTERM,
        target="run",
        plain_stack="goes back from 18 to 10",
    ),
    Scenario(
        "`kill -9` of the command",
        "vqvae",
        "slow",
        signal=SIGKILL,
        target="run",
        plain_stack="goes back from 13 to 10",
    ),
    Scenario(
        "`kill -9` of DVC",
        "vqvae",
        "slow",
        signal=SIGKILL,
        target="dvc",
        plain_stack="training continues alone; the next run deletes its output and starts a second training",
    ),
    Scenario("`kill -9` of the stage", "vqvae", "slow", signal=SIGKILL, target="stage"),
    Scenario("`kill -9` of the cluster", "vqvae", "slow", signal=SIGKILL, target="cluster"),
    *(Scenario("`kill -9` of a worker", stage, signal=SIGKILL, target="worker") for stage in MAPPING_STAGES),
    *(
        Scenario("a worker hangs, with a timeout of 10 s", stage, "stop", step=0, environment=SHORT_TIMEOUT)
        for stage in MAPPING_STAGES
    ),
)
BIT_FLIP_TESTS = (  # kind of file, test, detected flips in the plain stack
    ("a checkpoint", "stages/training/test_checkpoint_damage.py::test_a_thousand_bit_flips_are_detected", "0 of 100"),
    ("a shard", "stages/formats/test_shards.py::test_a_thousand_bit_flips_are_all_detected", "18 of 20 images vanish"),
    ("codes", "stages/test_training_stages.py::test_every_flipped_bit_in_a_codes_file_is_detected", "4 of 180"),
)
