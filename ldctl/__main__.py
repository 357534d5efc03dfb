"""`python -m ldctl`, as torchrun starts it."""

from ldctl.cli import main

main()
