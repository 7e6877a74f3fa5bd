"""DSKD and DSKDv2: dual-space knowledge distillation (arXiv 2406.17328 and 2504.11426).

White-box distillation compares a teacher's and a student's distributions that two different heads made. DSKD lets
one head
make both: teacher states are projected into the student's space and read by the student's head, student states into
the
teacher's space and read by the teacher's head. `objective` has the functions of the equations, `method.DSKD` is what
the platform drives.
"""
