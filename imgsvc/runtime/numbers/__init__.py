"""What pods and containers use, and what bounds them.

usage  oom  cgroups    cgroup files of both versions
podlimits              limits of a whole pod
stats  metrics         CRI statistics and cAdvisor's metrics
"""
