"""A node as users have it: a distribution's own kernel, in a virtual machine (make vm-test)."""
