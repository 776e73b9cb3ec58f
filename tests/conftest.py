"""What holds for every test."""

import signal

# A shell starts what runs in its background with SIGINT ignored, and every program that is started
# from there inherits that. Tests send SIGINT, as Ctrl-C does.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
