"""What things cost: time, memory, FLOPs, energy, and what energy stands for. Everything measured is a `Reading`, a run's total a `Cost`."""
