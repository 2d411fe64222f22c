"""What a training stage will take, before it is submitted: memory, time, network, energy, money, and what failures cost."""
