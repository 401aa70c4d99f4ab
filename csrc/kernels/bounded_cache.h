// A bounded cache for threads that share it, such as plans by device and shape.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace movq {

template <class Key, class Value, size_t MaxEntries>
class BoundedCache {
 public:
  // The value of `key`, from compute() at its first use. If compute() throws, nothing is cached. Thread-safe; compute() must not
  // use the same cache.
  template <class Compute>
  Value get(const Key& key, Compute&& compute) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = values_.find(key); found != values_.end()) return found->second;
    const Value value = compute();
    if (values_.size() >= MaxEntries) values_.clear();
    values_.emplace(key, value);
    return value;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Value> values_;
};

}  // namespace movq
