"""A guest that is nothing but pages of memory, for code that runs in the sandbox."""

from vmexit.errors import VmexitError

PAGE = 0x1000
KERNEL = 0xFFFF_F800_0000_0000


class Pages:
    """Guest memory by page; what is not there is not mapped."""

    def __init__(self, *addresses: int, gs: int = 0, fs: int = 0) -> None:
        self.pages = {address: bytearray(PAGE) for address in addresses}
        self.bases = fs, gs
        self.reads: list[int] = []
        self.writes: list[tuple[int, bytes]] = []

    def put(self, address: int, data: bytes) -> None:
        """Within one page."""
        self.pages[address & ~(PAGE - 1)][address % PAGE : address % PAGE + len(data)] = data

    def put_u64(self, address: int, value: int) -> None:
        self.put(address, value.to_bytes(8, "little"))

    def read_memory(self, address: int, length: int) -> bytes:
        self.reads.append(address)
        assert address % PAGE == 0 and length == PAGE
        if address not in self.pages:
            raise VmexitError("not mapped")
        return bytes(self.pages[address])

    def write_memory(self, address: int, data: bytes) -> None:
        if address & ~(PAGE - 1) not in self.pages:
            raise VmexitError("not mapped")
        self.writes.append((address, data))
        self.put(address, data)

    def segment_bases(self) -> tuple[int, int]:
        return self.bases
