"""The registry of conversion methods: how each sets theta and v0, which neuron it uses, what it must be given.

A new method joins with `register(Method(...))` and is then known to `convert`, to the command line and to every table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from micelab.activation import ActivationName
from micelab.exceptions import InputError
from micelab.methods.calibration import match_rates, match_steps
from micelab.methods.rivals import Accumulating, ChannelBias, Muting, Shifting, StepBias
from micelab.methods.thresholds import Observation, highest, mean_square_optimal, noisy_bound, percentile, trained_bound
from micelab.network.spiking import SpikingNetwork
from micelab.neuron.firing import IntegrateFire


@dataclass(frozen=True)
class Method:
    """One way to convert. `theta` maps an Observation to a threshold for each row of its samples, [C] > 0.

    `v0`: initial potential in units of theta, None for the trained one; `trained_with`: the activation that the network
    should have been trained with; `calibrates`: its thresholds come from calibration images; `neuron`: the kind of neuron;
    `hidden_steps`: steps spent beyond T, counted in every table; `calibrate`: called with (spiking network, images, the ANN's
    mean activations by layer [C], T) once thresholds are set; `each_step`: what it finds serves every number of steps up to
    T, so tables convert for their largest.

    >>> import micelab, torch
    >>> half = Method("half-of-highest", "an example", theta=lambda seen: highest(seen) / 2, v0=0.5)
    >>> snn = micelab.convert(micelab.small_cnn(), register(half).name, torch.rand(8, 1, 8, 8), time_steps=4)
    >>> snn.method, METHODS.pop(half.name) is half  # and away again
    ('half-of-highest', True)
    """

    name: str
    source: str
    theta: Callable[[Observation], Tensor]
    v0: float | None = 0.0
    signed: bool = False
    calibrates: bool = True
    trained_with: ActivationName = "relu"
    hidden_steps: int = 0
    neuron: type[IntegrateFire] = IntegrateFire
    calibrate: Callable[[SpikingNetwork, Tensor, dict[str, Tensor], int], None] | None = None
    each_step: bool = False

    @property
    def needs_images(self) -> bool:
        """Whether `convert` must be given calibration images."""
        return self.calibrates or self.calibrate is not None


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method under its name; raises InputError where the name is taken.

    >>> try:
    ...     register(get("qcfs"))
    ... except InputError as error:
    ...     print(error)
    a method named 'qcfs' is registered already: choose another name
    """
    if method.name in METHODS:
        raise InputError(f"a method named {method.name!r} is registered already: choose another name")
    METHODS[method.name] = method
    return method


def get(name: str) -> Method:
    """The method of that name; raises InputError that lists what there is.

    >>> get("srp").hidden_steps, get("qcfs").v0
    (4, 0.5)
    """
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"method {name!r} is unknown: choose one of {', '.join(METHODS)}")
    return METHODS[name]


register(
    Method(
        name="max",
        source="Diehl et al., IJCNN 2015: data-based threshold balancing by the maximum",
        theta=highest,
    )
)
register(
    Method(
        name="percentile",
        source="Rueckauer et al., Frontiers in Neuroscience 2017: robust normalization by a percentile",
        theta=percentile,
    )
)
register(
    Method(
        name="mse",
        source="Li et al., ICML 2021: grid search of the least mean square error to the clip-floor; start at half a threshold",
        theta=mean_square_optimal,
        v0=0.5,
    )
)
register(
    Method(
        name="tcl",
        source="Ho & Chang, DAC 2021 (arXiv 2008.04509): the trained clipping bound is the threshold",
        theta=trained_bound,
        calibrates=False,
        trained_with="clip",
    )
)
register(
    Method(
        name="qcfs",
        source="Bu et al., ICLR 2022: trained with quantization and clipping, start at half a threshold",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
    )
)
register(
    Method(
        name="half_start",
        source="Bu et al., AAAI 2022 (arXiv 2202.01440): a trained clip whose neurons start at half a threshold",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="clip",
    )
)
register(
    Method(
        name="calibrated",
        source="Li et al., ICML 2021 (light pipeline): least-square thresholds, then a bias for each channel so that its mean "
        "rate is the ANN's, layer by layer (documented: one round; here a few, and the start at half a threshold at once)",
        theta=mean_square_optimal,
        v0=0.5,
        neuron=ChannelBias,
        calibrate=match_rates,
    )
)
register(
    Method(
        name="signed",
        source="Wang et al., IJCAI 2022 (SNM): a neuron that has fired may take a spike back (documented: at v <= -theta from a "
        "start at 0; here, on a QCFS network that starts at theta/2, at v < 0, the same distance from the start)",
        theta=trained_bound,
        v0=0.5,
        signed=True,
        calibrates=False,
        trained_with="quant_clip",
    )
)
register(
    Method(
        name="srp",
        source="Hao et al., AAAI 2023 (SRP, arXiv 2302.02091): after 4 hidden steps, neurons whose potential is not above 0 are "
        "silent for all T steps",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
        hidden_steps=Muting.before,
        neuron=Muting,
    )
)
register(
    Method(
        name="cos",
        source="Hao et al., ICLR 2023 (COS, arXiv 2302.10685): after 4 hidden steps, each neuron's start is shifted by a spike's "
        "worth where it fired once too often or too seldom",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
        hidden_steps=Shifting.ahead,
        neuron=Shifting,
    )
)
register(
    Method(
        name="step_bias",
        source="Wu et al., ECCV 2024 (FTBC, arXiv 2403.18388): a bias for each step and channel so that the mean error of every "
        "step is 0 (documented: the aim, forward only; the search for it is ours)",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
        neuron=StepBias,
        calibrate=match_steps,
        each_step=True,
    )
)
register(
    Method(
        name="noise",
        source="Huang et al., IEEE TNNLS 2025 (NQ): a QCFS network trained with the measured noise of its own conversion",
        theta=noisy_bound,
        v0=0.5,
        calibrates=False,
        trained_with="noisy_quant_clip",
    )
)
register(
    Method(
        name="accumulate",
        source="An upper bound, not a rival (compare Datta et al., TMLR 2025): each layer waits for all T steps of the one "
        "before, so no timing error is left and the steps of all layers add up",
        theta=trained_bound,
        v0=0.5,
        calibrates=False,
        trained_with="quant_clip",
        neuron=Accumulating,
    )
)
register(
    Method(
        name="mice",
        source="after Ho & Chang, JETCAS 2023 (a reconstruction): trained with the spikes in the loop, theta and v0 as trained",
        theta=trained_bound,
        v0=None,
        calibrates=False,
        trained_with="spike_clip",
    )
)
