"""Every method of the platform: name -> "module:Class". Adding a method adds one line here."""

METHODS = {
    "aligndistil": "tenfold.methods.aligndistil.method:AlignDistil",
    "dskd": "tenfold.methods.dskd.method:DSKD",
    "gates": "tenfold.methods.gates.method:GATES",
    "layermoe": "tenfold.methods.layermoe.method:LayerMoE",
}
