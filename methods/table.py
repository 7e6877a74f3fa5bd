"""Every method of the platform: name -> "module:Class". Adding a method adds one line here."""

METHODS = {
    "dskd": "tenfold.methods.dskd.method:DSKD",
    "gates": "tenfold.methods.gates.method:GATES",
}
