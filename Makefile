VERSION ?= dev
LOCK ?= redlock
PROGRAM := bin/at-least-semaphore-pod-hook

.PHONY: help
help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: build bin/demo ## show the main job, start to end; needs nothing but Go. LOCK=etcd for the other lock
	@bin/demo $(demo-lock) story

.PHONY: run
run: build bin/demo ## start the demo's set-up and stay up, for trying it by hand
	@bin/demo $(demo-lock) run

# etcd is built from its module; the go command keeps it.
etcd = $(shell go tool -modfile=tools/go.mod -n go.etcd.io/etcd/server/v3)
demo-lock = $(if $(filter redlock,$(LOCK)),,$(if $(filter etcd,$(LOCK)),-etcd $(etcd),$(error LOCK is $(LOCK): it must be redlock or etcd)))

.PHONY: build
build: ## build the static binary into bin/
	@CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(VERSION)" -o $(PROGRAM) .

.PHONY: bin/demo
bin/demo:
	@go build -C demo -o ../bin/demo .

.PHONY: test
test: test-needs ## run all tests with the race detector; installs redis-server, gcc and curl if missing
	go test -race -count=1 ./...

.PHONY: test-needs
test-needs:
	@./.ci/need redis-server:redis-server gcc:gcc:libc6-dev curl:curl

.PHONY: lint
lint: ## check format, vet and staticcheck
	@test -z "$$(gofmt -l .)" || { echo "not gofmt-ed:"; gofmt -l .; exit 1; }
	go vet ./...
	go -C demo vet ./...
	go tool -modfile=tools/go.mod staticcheck ./...
