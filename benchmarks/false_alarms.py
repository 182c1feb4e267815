"""Honest implementations that the judge accuses: none. And how tight the bounds are.

Every member of the zoo (the specification run in float64, float32, float16, bfloat16, in three orders of summation,
strict and eager) is judged on every frozen vector and on freshly drawn cases. Prints the number of runs, the false
alarms, and the worst honest error / bound per operator and precision, the table of docs/accuracy.md.
"""

import argparse
from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings

from conformance import vectors
from conformance.adapters import spec
from conformance.budget import round_to
from conformance.case import OPERATORS, as_tuple, reference
from conformance.law import call
from conformance.report import column_of, figure
from conformance.strategies import of
from conformance.verdict import compare, judge

SHOWN = ("float64", "float32", "float16", "float16 eager", "bfloat16", "bfloat16 eager")


def fresh(op, implementation, examples, note):
    """Judge one member on `examples` drawn cases; note(ratio, elements, unverifiable, message) is called for each."""
    observe = OPERATORS()[op].observe

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(of(op, implementation.profile))
    def run(case):
        outputs = call(implementation.functions[op], case)
        if observe is not None:
            outputs = tuple(np.asarray(o, np.float64) for o in as_tuple(observe(case.arguments, outputs)))
        balls = reference(case)
        profile = replace(case.profile, angle="A32")
        vector = vectors.Vector(
            replace(case, exact=False),
            {k: b.value for k, b in balls.items()},
            {str(profile): {k: b.rad for k, b in balls.items()}},
        )
        note(compare(outputs, vector, profile, exact=False))

    run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5, help="drawn cases per operator and member")
    examples = parser.parse_args().examples
    runs, alarms, elements, silent, exact, unequal = Counter(), [], 0, 0, 0, 0
    worst: dict[tuple[str, str], float] = {}
    frozen = vectors.load()
    for member in spec.implementations():
        head = column_of(member.profile)
        for vector in frozen:
            if member.profile.dtype not in vector.case.dtypes:
                continue
            verdict = judge(member.name, member.functions[vector.case.op], vector, member.profile)
            runs["vectors"] += verdict.outcome != "skipped"
            if verdict.failed:
                alarms.append(f"{member.name} {vector.case.id}: {verdict.message}")
            elif vector.case.exact and verdict.outputs:
                unequal += any(
                    not np.array_equal(
                        round_to(o, member.profile.dtype), round_to(e, member.profile.dtype), equal_nan=True
                    )
                    for o, e in zip(verdict.outputs, vector.expected.values(), strict=True)
                )
                exact += 1
            elif not vector.case.ill_conditioned:
                elements, silent = elements + verdict.elements, silent + verdict.unverifiable
                if verdict.ratio == verdict.ratio:
                    key = (vector.case.op, head)
                    worst[key] = max(worst.get(key, 0.0), verdict.ratio)
        for op in OPERATORS():

            def note(result, op=op, member=member):
                runs["drawn"] += 1
                if not result.ok:
                    alarms.append(f"{member.name} {op} drawn: {result.message}")

            fresh(op, member, examples, note)
    kinds = f"{runs['vectors']} frozen, {runs['drawn']} drawn"
    print(f"honest runs: {sum(runs.values())} ({kinds}); false alarms: {len(alarms)}")
    for line in alarms[:20]:
        print(f"  {line}")
    print(f"unverifiable elements outside the cases made for it: {silent} of {elements} ({silent / elements:.4%})")
    print(f"exact vectors: {exact} runs, {unequal} not equal bit for bit")
    print("\nworst honest error / bound\n")
    print("| operator | " + " | ".join(SHOWN) + " |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for op in OPERATORS():
        cells = [figure(worst[op, head]) if (op, head) in worst else "" for head in SHOWN]
        print(f"| {op} | " + " | ".join(cells) + " |")
    for head in SHOWN:
        values = [v for (_, h), v in worst.items() if h == head]
        print(f"{head}: worst {max(values):.2g}, least {min(values):.2g} over {len(values)} operators")
    raise SystemExit(1 if alarms else 0)


if __name__ == "__main__":
    main()
