// Kills the process, or makes a call fail, at the n-th system call that changes a file below a folder.
//
// seccomp turns these calls into SIGSYS, whose handler decides what becomes of them. This catches every writer in the process: Python, C++,
// and Rust libraries that call the kernel without libc. The filter lasts as long as the process, so a process arms it after fork().
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <initializer_list>

namespace {

enum Fault { NONE, KILL, FAIL, FULL };

Fault fault = NONE;
long target = 0;      // the call at which it happens, counted from 1
bool halves = false;  // if that call is a write, its first half happens
int error = EIO;      // of the target; with FULL, of all later calls that take space too
int log_file = -1;    // receives a line per call
char folder[4096] = "";
std::atomic<long> calls{0};

enum Kind { OPENS, WRITES, TAKES_SPACE, FREES_SPACE };

struct Call {
  long number;
  const char* name;
  Kind kind;
  int file;  // index of the argument that is a descriptor: of the changed file or, if it has a path, of the folder; -1 if none
  int path;  // index of the argument that is a path; -1 if none
};

const Call CALLS[] = {
    {SYS_openat, "open", OPENS, 0, 1},
    {SYS_write, "write", WRITES, 0, -1},
    {SYS_pwrite64, "write", WRITES, 0, -1},
    {SYS_writev, "write", WRITES, 0, -1},
    {SYS_pwritev, "write", WRITES, 0, -1},
    {SYS_sendfile, "write", TAKES_SPACE, 0, -1},
    {SYS_fallocate, "allocate", TAKES_SPACE, 0, -1},
    {SYS_ftruncate, "truncate", FREES_SPACE, 0, -1},
    {SYS_truncate, "truncate", FREES_SPACE, -1, 0},
    {SYS_fsync, "sync", TAKES_SPACE, 0, -1},  // file systems that allocate late notice a full disk here
    {SYS_fdatasync, "sync", TAKES_SPACE, 0, -1},
    {SYS_renameat, "rename", TAKES_SPACE, 2, 3},
    {SYS_renameat2, "rename", TAKES_SPACE, 2, 3},
    {SYS_linkat, "link", TAKES_SPACE, 2, 3},
    {SYS_symlinkat, "link", TAKES_SPACE, 1, 2},
    {SYS_unlinkat, "unlink", FREES_SPACE, 0, 1},
    {SYS_mkdirat, "mkdir", TAKES_SPACE, 0, 1},
    {SYS_fchmod, "chmod", FREES_SPACE, 0, -1},
    {SYS_fchmodat, "chmod", FREES_SPACE, 0, 1},
#ifdef __x86_64__  // the calls that newer architectures lack
    {SYS_open, "open", OPENS, -1, 0},
    {SYS_creat, "open", TAKES_SPACE, -1, 0},
    {SYS_rename, "rename", TAKES_SPACE, -1, 1},
    {SYS_link, "link", TAKES_SPACE, -1, 1},
    {SYS_symlink, "link", TAKES_SPACE, -1, 1},
    {SYS_unlink, "unlink", FREES_SPACE, -1, 0},
    {SYS_rmdir, "unlink", FREES_SPACE, -1, 0},
    {SYS_mkdir, "mkdir", TAKES_SPACE, -1, 0},
    {SYS_chmod, "chmod", FREES_SPACE, -1, 0},
#endif
};
constexpr int COUNT = sizeof CALLS / sizeof CALLS[0];
constexpr unsigned PASS = 0x6d6f7671;  // the sixth argument of calls that the filter lets through; none of CALLS has six

long pass(long number, const long (&a)[6]) {
  const long result = syscall(number, a[0], a[1], a[2], a[3], a[4], static_cast<long>(PASS));
  return result < 0 ? -errno : result;
}

long descriptor_path(int file, char* out, size_t size) {
  char link[64];
  snprintf(link, sizeof link, file == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", file);
  const long length = syscall(SYS_readlinkat, AT_FDCWD, link, out, size - 1);
  out[length < 0 ? 0 : length] = 0;
  return length;
}

// Writes the absolute path that a call changes to out.
void changed_path(const Call& call, const long (&a)[6], char (&out)[8192]) {
  const char* path = call.path < 0 ? nullptr : reinterpret_cast<const char*>(a[call.path]);
  size_t used = 0;
  out[0] = 0;
  if (!path || path[0] != '/') {
    descriptor_path(call.file < 0 ? AT_FDCWD : static_cast<int>(a[call.file]), out, 4096);
    used = strlen(out);
  }
  if (path) snprintf(out + used, sizeof out - used, "%s%.4000s", used ? "/" : "", path);
}

bool is_below(const char* path) {
  const size_t length = strlen(folder);
  return length > 0 && strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

// Writes the first half of what the call would write.
long write_half(const Call& call, long (&a)[6]) {
  if (call.number == SYS_writev || call.number == SYS_pwritev) {
    const iovec& part = *reinterpret_cast<const iovec*>(a[1]);
    const iovec half = {part.iov_base, (part.iov_len + 1) / 2};
    a[1] = reinterpret_cast<long>(&half), a[2] = 1;
    return pass(call.number, a);
  }
  a[2] = (a[2] + 1) / 2;
  return pass(call.number, a);
}

// Returns what a call returns to its caller: a result, or a negative error number.
long outcome(const Call& call, long (&a)[6]) {
  char path[8192];
  changed_path(call, a, path);
  if (!is_below(path)) return pass(call.number, a);
  const long n = ++calls;
  if (log_file >= 0) {
    char line[8300];
    const long size = snprintf(line, sizeof line, "%s %s\n", call.name, path);
    pass(SYS_write, {log_file, reinterpret_cast<long>(line), size, 0, 0, 0});
  }
  const bool takes_half = halves && n == target && call.kind == WRITES;
  if (fault == KILL && n == target) {
    if (takes_half) write_half(call, a);
    syscall(SYS_kill, getpid(), SIGKILL);
  }
  if ((fault == FAIL && n == target) || (fault == FULL && n >= target && call.kind != FREES_SPACE)) {
    return takes_half ? write_half(call, a) : -error;
  }
  return pass(call.number, a);
}

void on_call(int, siginfo_t* info, void* context) {
  const int before = errno;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#ifdef __x86_64__
  const auto& r = registers.gregs;
  long arguments[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  auto& result = registers.gregs[REG_RAX];
#else
  long arguments[6];
  for (int i = 0; i < 6; ++i) arguments[i] = registers.regs[i];
  auto& result = registers.regs[0];
#endif
  result = -ENOSYS;  // of calls that are not in CALLS: their callers have other ways
  for (const Call& call : CALLS) {
    if (call.number == info->si_syscall) result = outcome(call, arguments);
  }
  errno = before;
}

// Runs in programs that the process starts with this library in LD_PRELOAD: they inherit the filter, and all their calls pass.
__attribute__((constructor)) void handle_calls() {
  struct sigaction action = {};
  action.sa_sigaction = on_call;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  sigaction(SIGSYS, &action, nullptr);
}

}  // namespace

// Arms the fault in this process. Returns 0, or an error number if the kernel has no seccomp.
extern "C" int arm(const char* below, int kind, long at, int half, int error_number, int log_descriptor) {
  snprintf(folder, sizeof folder, "%s", below);
  fault = static_cast<Fault>(kind), target = at, halves = half, error = error_number, log_file = log_descriptor;

  // The program: load the number of the call. For a number in the table, trap unless the sixth argument is PASS or the call opens a
  // file that exists, to read it or write to it in place.
  sock_filter code[4 * COUNT + 16];
  int n = 0;
  const auto load = [&](size_t offset) { code[n++] = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<unsigned>(offset)); };
  const auto skip = [&](unsigned short test, unsigned value, int if_true, int if_false) {
    code[n++] =
        BPF_JUMP(BPF_JMP | test | BPF_K, value, static_cast<unsigned char>(if_true), static_cast<unsigned char>(if_false));
  };
  const auto end = [&](unsigned action) { code[n++] = BPF_STMT(BPF_RET | BPF_K, action); };
  const auto argument = [](int i) { return offsetof(seccomp_data, args) + 8 * i; };
  load(argument(5));
  skip(BPF_JEQ, PASS, 0, 1);
  end(SECCOMP_RET_ALLOW);
  load(offsetof(seccomp_data, nr));
  for (const Call& call : CALLS) {
    if (call.kind == OPENS) {
      skip(BPF_JEQ, static_cast<unsigned>(call.number), 0, 4);
      load(argument(call.path + 1));
      skip(BPF_JSET, O_CREAT | O_TRUNC, 1, 0);
      end(SECCOMP_RET_ALLOW);
    } else {
      skip(BPF_JEQ, static_cast<unsigned>(call.number), 0, 1);
    }
    end(SECCOMP_RET_TRAP);
  }
  for (const long number : {SYS_copy_file_range, SYS_pwritev2}) {  // have six arguments; Python and Rust do without
    skip(BPF_JEQ, static_cast<unsigned>(number), 0, 1);
    end(SECCOMP_RET_TRAP);
  }
  end(SECCOMP_RET_ALLOW);
  const sock_fprog program = {static_cast<unsigned short>(n), code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) ? errno : 0;
}
