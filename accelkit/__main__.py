"""``python -m accelkit``, which is also what ``accelerate launch -m accelkit`` runs."""

from accelkit.cli import main

main()
