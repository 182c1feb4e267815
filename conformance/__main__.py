"""`python -m conformance`: the judge's sub-commands."""

from conformance.command import main

main()
