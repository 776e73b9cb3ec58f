"""The unprivileged side: holds the Kubernetes token, never touches NVML or the host's /proc."""
