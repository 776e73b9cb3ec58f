"""What both sides of the privilege boundary speak: messages, transport, settings, logging."""

__version__ = "1.0.0"
