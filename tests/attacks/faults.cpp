// Kills the process, or makes a call fail, at the n-th system call that changes a file below a folder. Loaded with LD_PRELOAD, so that it
// sees the writers of Python, torch (C++), safetensors (Rust) and Arrow alike. A process arms it after fork().
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace {

enum Fault { NONE, KILL, FAIL, FULL };

Fault fault = NONE;
long target = 0;       // the call at which it happens, counted from 1
bool halves = false;   // if that call is a write, its first half happens
int error = EIO;       // of FAIL, and of all calls from the target on with FULL
int log_file = -1;     // receives a line per call
char folder[4096] = "";
std::atomic<long> calls{0};

enum Outcome { PASSES, FAILS, HALF };

bool below(const char* path) {
    const size_t length = strlen(folder);
    return length > 0 && strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

// Counts a call that changes this file, and decides what becomes of it. Calls that free space succeed on a full disk.
Outcome meet(const char* name, const char* path, bool is_write, bool takes_space) {
    if (!below(path)) return PASSES;
    const long call = ++calls;
    if (log_file >= 0) {
        char line[4200];
        const int size = snprintf(line, sizeof line, "%s %s\n", name, path);
        syscall(SYS_write, log_file, line, size);
    }
    if (fault == KILL && call == target) {
        if (is_write && halves) return HALF;
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    const bool fails = (fault == FAIL && call == target) || (fault == FULL && call >= target && takes_space);
    if (!fails) return PASSES;
    errno = error;
    return is_write && halves && call == target ? HALF : FAILS;
}

void absolute(char (&out)[4096], int at, const char* path) {
    char base[2048] = "";
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        base[std::max<ssize_t>(0, syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1))] = 0;
    }
    snprintf(out, sizeof out, "%s%s%.2000s", base, base[0] ? "/" : "", path);
}

Outcome meet_path(const char* name, int at, const char* path, bool takes_space) {
    if (!folder[0] || !path) return PASSES;
    const int before = errno;
    char whole[4096];
    absolute(whole, at, path);
    errno = before;
    return meet(name, whole, false, takes_space);
}

Outcome meet_file(const char* name, int file, bool is_write, bool takes_space = true) {
    if (!folder[0]) return PASSES;
    const int before = errno;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    const ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return PASSES;
    path[size] = 0;
    return meet(name, path, is_write, takes_space);
}

// After the first half of a write: dies, or returns what a nearly full disk returns.
ssize_t after_half(ssize_t written) {
    if (fault == KILL) syscall(SYS_kill, getpid(), SIGKILL);
    return written;
}

int open_file(int at, const char* path, int flags, mode_t mode) {
    if (flags & (O_CREAT | O_TRUNC)) {
        if (meet_path("open", at, path, flags & O_CREAT) != PASSES) return -1;
    }
    return syscall(SYS_openat, at, path, flags, mode);
}

ssize_t write_vector(const char* name, int file, const iovec* parts, int count, off_t offset, bool at_offset) {
    const Outcome outcome = meet_file(name, file, true);
    if (outcome == FAILS) return -1;
    iovec first = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};
    const iovec* what = outcome == HALF ? &first : parts;
    const int many = outcome == HALF ? 1 : count;
    const ssize_t written =
        at_offset ? syscall(SYS_pwritev, file, what, many, offset, 0) : syscall(SYS_writev, file, what, many);
    return outcome == HALF ? after_half(written) : written;
}

FILE* open_stream(const char* symbol, const char* path, const char* mode) {
    using Function = FILE* (*)(const char*, const char*);
    if (strpbrk(mode, "wa") && meet_path("open", AT_FDCWD, path, true) != PASSES) return nullptr;
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, symbol))(path, mode);
}

}  // namespace

extern "C" {

void faults_arm(const char* below_folder, int kind, long at, int split_writes, int error_number, int log_descriptor) {
    snprintf(folder, sizeof folder, "%s", below_folder);
    fault = static_cast<Fault>(kind);
    target = at, halves = split_writes, error = error_number, log_file = log_descriptor;
    calls = 0;
}

#define OPEN_ARGUMENTS                                  \
    mode_t mode = 0;                                    \
    if (flags & (O_CREAT | __O_TMPFILE)) {              \
        va_list rest;                                   \
        va_start(rest, flags);                          \
        mode = static_cast<mode_t>(va_arg(rest, int));  \
        va_end(rest);                                   \
    }
int open(const char* path, int flags, ...) { OPEN_ARGUMENTS return open_file(AT_FDCWD, path, flags, mode); }
int open64(const char* path, int flags, ...) { OPEN_ARGUMENTS return open_file(AT_FDCWD, path, flags, mode); }
int openat(int at, const char* path, int flags, ...) { OPEN_ARGUMENTS return open_file(at, path, flags, mode); }
int openat64(int at, const char* path, int flags, ...) { OPEN_ARGUMENTS return open_file(at, path, flags, mode); }
int creat(const char* path, mode_t mode) { return open_file(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
FILE* fopen(const char* path, const char* mode) { return open_stream("fopen", path, mode); }
FILE* fopen64(const char* path, const char* mode) { return open_stream("fopen64", path, mode); }

ssize_t write(int file, const void* data, size_t size) {
    const Outcome outcome = meet_file("write", file, true);
    if (outcome == FAILS) return -1;
    const ssize_t written = syscall(SYS_write, file, data, outcome == HALF ? (size + 1) / 2 : size);
    return outcome == HALF ? after_half(written) : written;
}
ssize_t pwrite(int file, const void* data, size_t size, off_t offset) {
    const iovec part = {const_cast<void*>(data), size};
    return write_vector("pwrite", file, &part, 1, offset, true);
}
ssize_t pwrite64(int file, const void* data, size_t size, off_t offset) { return pwrite(file, data, size, offset); }
ssize_t writev(int file, const iovec* parts, int count) { return write_vector("writev", file, parts, count, 0, false); }
ssize_t pwritev(int file, const iovec* parts, int count, off_t at) { return write_vector("pwritev", file, parts, count, at, true); }
ssize_t pwritev64(int file, const iovec* parts, int count, off_t at) { return pwritev(file, parts, count, at); }
ssize_t sendfile(int to, int from, off_t* offset, size_t size) {
    return meet_file("sendfile", to, false) != PASSES ? -1 : syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off_t* offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off64_t* in, int to, off64_t* out, size_t size, unsigned flags) {
    if (meet_file("copy_file_range", to, false) != PASSES) return -1;
    return syscall(SYS_copy_file_range, from, in, to, out, size, flags);
}

int fsync(int file) { return meet_file("fsync", file, false) != PASSES ? -1 : syscall(SYS_fsync, file); }
int fdatasync(int file) { return meet_file("fsync", file, false) != PASSES ? -1 : syscall(SYS_fdatasync, file); }
int ftruncate(int file, off_t size) {
    return meet_file("truncate", file, false, false) != PASSES ? -1 : syscall(SYS_ftruncate, file, size);
}
int ftruncate64(int file, off_t size) { return ftruncate(file, size); }
int truncate(const char* path, off_t size) {
    return meet_path("truncate", AT_FDCWD, path, false) != PASSES ? -1 : syscall(SYS_truncate, path, size);
}
int truncate64(const char* path, off_t size) { return truncate(path, size); }
int fallocate(int file, int mode, off_t offset, off_t size) {
    return meet_file("allocate", file, false) != PASSES ? -1 : syscall(SYS_fallocate, file, mode, offset, size);
}
int fallocate64(int file, int mode, off_t offset, off_t size) { return fallocate(file, mode, offset, size); }
int posix_fallocate(int file, off_t offset, off_t size) { return fallocate(file, 0, offset, size) ? errno : 0; }
int posix_fallocate64(int file, off_t offset, off_t size) { return posix_fallocate(file, offset, size); }

int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
    return meet_path("rename", to_at, to, true) != PASSES ? -1 : syscall(SYS_renameat2, from_at, from, to_at, to, flags);
}
int renameat(int from_at, const char* from, int to_at, const char* to) { return renameat2(from_at, from, to_at, to, 0); }
int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
    return meet_path("link", to_at, to, true) != PASSES ? -1 : syscall(SYS_linkat, from_at, from, to_at, to, flags);
}
int link(const char* from, const char* to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int symlinkat(const char* to, int at, const char* path) {
    return meet_path("link", at, path, true) != PASSES ? -1 : syscall(SYS_symlinkat, to, at, path);
}
int symlink(const char* to, const char* path) { return symlinkat(to, AT_FDCWD, path); }
int unlinkat(int at, const char* path, int flags) {
    return meet_path("unlink", at, path, false) != PASSES ? -1 : syscall(SYS_unlinkat, at, path, flags);
}
int unlink(const char* path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int at, const char* path, mode_t mode) {
    return meet_path("mkdir", at, path, true) != PASSES ? -1 : syscall(SYS_mkdirat, at, path, mode);
}
int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int fchmodat(int at, const char* path, mode_t mode, int flags) {
    if (meet_path("chmod", at, path, false) != PASSES) return -1;
    (void)flags;
    return syscall(SYS_fchmodat, at, path, mode);
}
int chmod(const char* path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
int fchmod(int file, mode_t mode) {
    return meet_file("chmod", file, false, false) != PASSES ? -1 : syscall(SYS_fchmod, file, mode);
}

}  // extern "C"
