"""The debug client: reads the enforcer's sockets, changes nothing."""
