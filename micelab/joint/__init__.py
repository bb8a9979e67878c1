"""Stage 2, joint training: true spikes forward; backward the gradient of their rates, or that of every spike."""

from micelab.joint.loop import SpikesInTheLoop
from micelab.joint.run import prepare, train
from micelab.joint.through_time import SpikesThroughTime
from micelab.train.recipe import JointConfig, ThroughTimeConfig

__all__ = ["JointConfig", "SpikesInTheLoop", "SpikesThroughTime", "ThroughTimeConfig", "prepare", "train"]
