"""`python -m fusedvlm.trainers STAGE ...`: what `accelerate launch -m fusedvlm.trainers` runs on every process."""

from fusedvlm.trainers.cli import main

main()
