"""The RuntimeDefault seccomp profile: what ordinary programs need, by purpose; everything else answers EPERM.

Left out on purpose: kernel modules, kexec, reboot, clocks, swap, quotas, ptrace-like access for old kernels aside, new
namespaces and mounts (they come back with CAP_SYS_ADMIN), keyrings, perf and BPF, userfaultfd, io_uring, obsolete calls.
Sockets of the families AF_ALG and AF_VSOCK are refused: both reach far into the kernel.

Names a libseccomp or an architecture does not know are skipped by the runtimes.
Source: syscalls(2), capabilities(7); runtime-spec config-linux.md#seccomp.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any, Final

_FILES: Final = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64
fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fremovexattr
fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr
getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link linkat listxattr
listxattrat llistxattr lremovexattr lseek _llseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat
open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr
removexattrat rename renameat renameat2 rmdir sendfile sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statx
symlink symlinkat sync sync_file_range sync_file_range2 syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat
utimensat_time64 utimes vmsplice write writev fanotify_mark cachestat statmount listmount
"""
_MEMORY: Final = """
brk get_mempolicy madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect
mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_madvise process_mrelease remap_file_pages
"""
_PROCESSES: Final = """
arch_prctl capget capset execve execveat exit exit_group fork getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups
getgroups32 getpgid getpgrp getpid getppid getpriority getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid
getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self pidfd_open
pidfd_send_signal prctl prlimit64 rseq sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam
sched_setscheduler sched_yield seccomp set_robust_list get_robust_list set_thread_area get_thread_area set_tid_address setfsgid
setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority setregid setregid32 setresgid setresgid32
setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32 sysinfo tgkill times tkill ugetrlimit uname vfork wait4
waitid waitpid getcpu lsm_get_self_attr lsm_list_modules lsm_set_self_attr modify_ldt
"""
_SIGNALS_AND_TIME: Final = """
alarm clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday
nanosleep pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo setitimer sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend
time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 adjtimex clock_adjtime clock_adjtime64
"""
_WAITING: Final = """
_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake io_cancel io_destroy io_getevents io_pgetevents
io_pgetevents_time64 io_setup io_submit poll ppoll ppoll_time64 pselect6 pselect6_time64 select
"""
_SOCKETS_AND_IPC: Final = """
accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open mq_timedreceive
mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd pipe pipe2 recv recvfrom recvmmsg
recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg sendmsg sendto setsockopt shmat shmctl shmdt
shmget shutdown socketcall socketpair getrandom
"""
_TRACING: Final = "kcmp process_vm_readv process_vm_writev ptrace pidfd_getfd"  # safe on kernels that honour seccomp under ptrace, 4.8 on

# What a capability that was granted makes usable again.
_WITH_CAPABILITY: Final[Mapping[str, str]] = {
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_ADMIN": """bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount
        open_tree open_tree_attr perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare""",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": "mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}
_AF_ALG: Final = 38
_AF_VSOCK: Final = 40
_NEW_NAMESPACES: Final = 0x7E020000  # every CLONE_NEW* flag of clone(2)
_ENOSYS: Final = 38
_PERSONALITIES: Final = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, 32-bit uname, both, and asking
_ARCHITECTURES: Final[Mapping[str, tuple[str, ...]]] = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "riscv64": ("SCMP_ARCH_RISCV64",),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
    "ppc64le": ("SCMP_ARCH_PPC64LE",),
}


def default_profile(capabilities: frozenset[str]) -> dict[str, Any]:
    """The `linux.seccomp` object for a process with these capabilities."""
    names = sorted(
        {n for group in (_FILES, _MEMORY, _PROCESSES, _SIGNALS_AND_TIME, _WAITING, _SOCKETS_AND_IPC, _TRACING) for n in group.split()}
    )
    rules: list[dict[str, Any]] = [_allow(names)]
    families = (
        {"value": _AF_ALG, "op": "SCMP_CMP_LT"},
        {"value": _AF_ALG + 1, "op": "SCMP_CMP_EQ"},
        {"value": _AF_VSOCK, "op": "SCMP_CMP_GT"},
    )
    rules += [_allow(["socket"], [{"index": 0, **family}]) for family in families]
    rules += [_allow(["personality"], [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]) for value in _PERSONALITIES]
    granted = sorted({n for c, calls in _WITH_CAPABILITY.items() if c in capabilities for n in calls.split()})
    if granted:
        rules.append(_allow(granted))
    if "CAP_SYS_ADMIN" not in capabilities:
        flags = 1 if platform.machine() == "s390x" else 0  # where clone(2) takes its flags
        no_namespace = {"index": flags, "value": _NEW_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        rules.append(_allow(["clone"], [no_namespace]))
        # Its flags are behind a pointer; ENOSYS makes the C library fall back to clone.
        rules.append({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": list(_ARCHITECTURES.get(platform.machine(), ())),
        "syscalls": rules,
    }


def _allow(names: list[str], arguments: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW"}
    return rule | {"args": arguments} if arguments else rule
