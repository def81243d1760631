// Making backward nodes of our own, for every torch version.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>

// Up to some torch 2.12 nodes are held by shared_ptr with this deleter, later ones by intrusive_ptr. Declared here so
// that one source serves both; where torch has no such function nothing refers to it.
namespace torch::autograd {
void deleteNode(Node* function);
}

namespace quantkern {

using NodePtr = decltype(torch::autograd::Edge::function);

template <class N, class Ptr = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<torch::autograd::Node>>)
    return std::shared_ptr<N>(new N(), torch::autograd::deleteNode);
  else
    return c10::make_intrusive<N>();
}

}  // namespace quantkern
