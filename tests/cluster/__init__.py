"""What an administrator does, on a real cluster: real kubelet, real containers, simulated GPUs."""
