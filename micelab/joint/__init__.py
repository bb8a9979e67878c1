"""Stage 2, joint training: true spikes forward, the gradient of their rates backward."""

from micelab.joint.loop import SpikesInTheLoop
from micelab.joint.run import prepare, train
from micelab.train.recipe import JointConfig

__all__ = ["JointConfig", "SpikesInTheLoop", "prepare", "train"]
