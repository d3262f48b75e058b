"""Platform, process groups, collectives, schedules: all that knows there is more than one rank.

Importing the package guards `import megatron.core` against a broken Transformer Engine, so it goes first.
"""

from megaeva.parallel import platform as platform
