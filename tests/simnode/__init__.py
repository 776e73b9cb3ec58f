"""The simulated node: GPUs, Kubernetes API and workloads that need no hardware and no cluster."""
