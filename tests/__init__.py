"""The tests of Power Agent, and the simulated node they run on."""
