"""Where the results of events go besides the screen: files, pipes, sockets, modules, traces, JetStream."""

from vmexit.outputs.output import Output, OutputState
from vmexit.outputs.outputs import Outputs
from vmexit.outputs.sink import OutputError

__all__ = ["Output", "OutputError", "OutputState", "Outputs"]
