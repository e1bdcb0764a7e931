package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// pod is an admitted pod. Only its injected containers run: the demo acts as the kubelet.
type pod struct {
	name, uid, token string
	patch            []patchOperation
	args             []string // of the sidecar, as the patch has them
	sidecar, await   *process
}

// newPod makes a pod from the webhook's answer.
func newPod(name string, a *answer) (*pod, error) {
	p := &pod{name: name, uid: newUID()}
	if err := json.Unmarshal(a.Patch, &p.patch); err != nil {
		return nil, err
	}
	var err error
	if p.args, err = sidecarArgs(p.patch); err != nil {
		return nil, err
	}
	p.token = p.expand(p.args[len(p.args)-1])
	return p, nil
}

// newUID makes a UUID.
func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// expand expands args as the kubelet does.
func (p *pod) expand(arg string) string { return strings.ReplaceAll(arg, "$(POD_UID)", p.uid) }

// detailPatch prints what the webhook adds to a pod.
func (s *setup) detailPatch(p *pod) {
	for _, o := range p.patch {
		value := string(o.Value)
		if strings.HasPrefix(value, "[") {
			value = "sidecar, args " + strings.Join(p.args[1:], " ") + "; await"
		}
		s.detail("%s %s: %s", o.Op, o.Path, value)
	}
}

// startSidecar starts the sidecar that the patch injects.
func (s *setup) startSidecar(p *pod) (err error) {
	var args []string
	for _, a := range p.args {
		args = append(args, p.expand(a))
	}
	env := []string{"POD_UID=" + p.uid, "POD_NAME=" + p.name, "NODE_NAME=node-1"}
	if p.sidecar, err = s.start(env, s.options.program, args...); err != nil {
		return fmt.Errorf("start the sidecar of %s: %w", p.name, err)
	}
	s.pods[p.name] = p
	s.markers = append(s.markers, "/dev/shm/at-least-semaphore-pod-"+p.uid)
	return nil
}

// removeMarkers removes the start marks, by which a sidecar knows that its pod's app
// runs. Kubernetes removes them with the pod.
func (s *setup) removeMarkers() {
	for _, m := range s.markers {
		_ = os.Remove(m) // it may be missing
	}
}

// wantLog waits for a log message of the sidecar that begins with want, and returns it.
func (p *pod) wantLog(ctx context.Context, want string) (message string, err error) {
	return message, poll(ctx, "the sidecar of "+p.name+" does not log: "+want, func() error {
		log := p.sidecar.log.String()
		for lines := bufio.NewScanner(strings.NewReader(log)); lines.Scan(); {
			var line struct{ Msg string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && strings.HasPrefix(line.Msg, want) {
				message = line.Msg
				return nil
			}
		}
		return errors.New("its log: " + log)
	})
}

// startAwait starts the pod's init container "await", which holds back its app.
func (s *setup) startAwait(p *pod) (err error) {
	p.await, err = s.start([]string{"POD_UID=" + p.uid}, s.options.program, "await")
	return err
}

// end ends a pod: its sidecar gives its token back or leaves the line.
func (s *setup) end(name string) error {
	p := s.pods[name]
	if code, err := p.sidecar.end(syscall.SIGTERM); err != nil || code != 0 {
		return fmt.Errorf("the sidecar of %s ended with %d, %v:\n%s", name, code, err, p.sidecar.log.String())
	}
	s.detail("the sidecar of %s exited with 0", name)
	return nil
}
