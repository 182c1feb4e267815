"""flash-linear-attention's naive functions: which of our operators has their arguments, and what it ought to return."""

import numpy as np

from conformance.budget import Profile
from conformance.case import Case, reference
from tests.golden import collection

# The form that each runs, and its scale where that is not d^(-1/2).
FORMS = {
    "linear_attn_recurrent": "recurrent",
    "linear_attn_recurrent_init_scale": "recurrent",
    "linear_attn_recurrent_normalize": "recurrent",
    "linear_attn_recurrent_normalize_init": "recurrent",
    "linear_attn_chunk64": "chunked",
    "simple_gla_recurrent": "recurrent",
    "simple_gla_recurrent_init": "recurrent",
    "simple_gla_chunk": "chunked",
    "simple_gla_parallel": "quadratic",
    "gla_recurrent": "recurrent",
    "gla_recurrent_init": "recurrent",
    "retention": "quadratic",
    "hgrn_recurrent": "recurrent",
}
SCALES = {"linear_attn_recurrent_init_scale": 0.37, "simple_gla_recurrent_init": 0.5, "hgrn_recurrent": 1.0}
CHUNKS = {"linear_attn_chunk64": 64, "simple_gla_chunk": 8}
# S_t = S_(t-1) (1 - beta k k') + beta k v', which is none of our recurrences: what is stored depends on what is there.
OUTSIDE = {
    "delta_rule_recurrent": "the delta rule is not in the specification",
    "delta_rule_recurrent_init": "the delta rule is not in the specification",
    "gated_delta_rule_recurrent": "the gated delta rule is not in the specification",
    "gated_delta_rule_recurrent_init": "the gated delta rule is not in the specification",
}


class Run:
    """One file: arguments of one of our forms, and the originals' results in float64 and in float32, in our layout."""

    def __init__(self, name):
        self.name, self.arrays = name, collection.load("fla_naive", name)
        self.normalised = "normalize" in name
        self.arguments = self._arguments()
        results = ("o", "final_state", "final_z")
        self.double = tuple(self._laid_out(r) for r in results if r in self.arrays)
        self.single = tuple(self._laid_out(f"float32_{r}") for r in results if r in self.arrays)

    def _arguments(self):
        name, arrays = self.name, self.arrays
        if name == "hgrn_recurrent":
            # h = exp(g) h + x, feature by feature: every feature is a head of width 1.
            x = arrays["x"][..., None]
            state = arrays["initial_state"][..., None, None]
            ones = np.ones_like(x)
            return {
                "q": ones, "k": ones, "v": x, "scale": 1.0, "log_decay": arrays["g"], "initial_state": state
            }  # fmt: skip
        given = {letter: self._laid_out(letter) for letter in "qkv"}
        b, n, h, d = given["q"].shape
        given |= {"scale": SCALES.get(name, d**-0.5), "initial_state": arrays.get("initial_state")}
        if self.normalised:
            z = arrays.get("initial_z")
            return given | {"epsilon": 1e-10, "initial_normaliser": None if z is None else z[:, 0]}
        decay = arrays.get("g", arrays.get("gk"))
        if name == "retention":
            decay = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(h))), (b, n, h))
        return given | {"log_decay": decay}

    def _laid_out(self, name):
        array = self.arrays[name]
        if self.name == "retention":
            return array.swapaxes(1, 2)
        if self.name == "hgrn_recurrent":
            return array[..., None] if array.ndim == 3 else array[..., None, None]
        return array[:, 0] if name.endswith("final_z") else array

    def balls(self, **changes):
        """What float32 may make of it, in the form that it ran."""
        form, chunk = FORMS[self.name], CHUNKS.get(self.name)
        given = self.arguments | changes | ({} if chunk is None else {"chunk_size": chunk})
        op = f"linear_attention.{form}"
        if self.normalised:
            op, given = "linear_attention.normalised", given | {"form": form}
        case = Case(op, self.name, given)
        return tuple(reference(case.under(Profile("float32", "strict", "A64"))).values())
