package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kaidotio/at-least-semaphore-pod-hook/test/rig"
	corev1 "k8s.io/api/core/v1"
)

// whenFull annotates the pod of a review.
func whenFull(value string) func(map[string]any) {
	return func(request map[string]any) { rig.AnnotationsOf(request)[annotationWhenFull] = value }
}

// A pod that is to wait is admitted without a token, and without Redis, with a sidecar that gets its token itself.
func TestWaitingPodIsAdmitted(t *testing.T) {
	for name, c := range map[string]struct {
		whenFull string
		change   []func(map[string]any)
	}{
		"by the flag":       {whenFullWait, nil},
		"by the annotation": {whenFullDeny, []func(map[string]any){whenFull(whenFullWait)}},
		"dry run":           {whenFullWait, []func(map[string]any){func(r map[string]any) { r["dryRun"] = true }}},
	} {
		config := testConfig(rig.FreeAddress(t))
		config.whenFull = c.whenFull
		w := startWebhook(t, config)
		id := freshID()
		a := w.admit(t, rig.Review(t, id, 3, c.change...))
		if !a.Allowed || a.Token != "" || !slices.Equal(a.Warnings, []string{warningWaits}) {
			t.Errorf("%s: answered %+v", name, a)
		}
		if patch := string(a.Patch); !strings.Contains(patch, `"--length=3","--expiration-seconds=10","--lock-mode=redlock","--redis-addresses=`+config.redisAddresses[0]+`","`+id.String()+`","$(POD_UID)"]`) {
			t.Errorf("%s: the patch is %s", name, patch)
		}
		want := verdictWait
		if c.change != nil && c.whenFull == whenFullWait {
			want = verdictDryRun
		}
		if lines := w.log.WantLines(t, "admission", 1); lines[0]["verdict"] != want || lines[0]["token"] != "" {
			t.Errorf("%s: logged %v", name, lines)
		}
	}
}

// The annotation wins over the flag.
func TestAnnotationDeniesDespiteFlag(t *testing.T) {
	c := testConfig(rig.CommonRedis(t).Address)
	c.whenFull = whenFullWait
	w := startWebhook(t, c)
	id := freshID()
	if a := w.admit(t, rig.Review(t, id, 1, whenFull(whenFullDeny))); !a.Allowed || a.Token == "" || len(a.Warnings) != 0 {
		t.Errorf("answered %+v", a)
	}
	if a := w.admit(t, rig.Review(t, id, 1, whenFull(whenFullDeny))); a.Allowed || a.Code != http.StatusTooManyRequests {
		t.Errorf("answered %+v", a)
	}
}

// Waiting needs native sidecars; what else is wrong is said, too.
func TestWaitingWithClassicSidecarIsDenied(t *testing.T) {
	c := testConfig(rig.FreeAddress(t))
	c.enableSidecarContainers = false
	w := startWebhook(t, c)
	a := w.admit(t, rig.Review(t, freshID(), 1, whenFull(whenFullWait)))
	if want := `invalid annotations: ` + annotationWhenFull + ` is "wait": this needs native sidecars, and the webhook injects classic ones (--enable-sidecar-containers=false)`; a.Allowed || a.Code != http.StatusUnprocessableEntity || a.Message != want {
		t.Errorf("answered %+v, want %s", a, want)
	}
	a = w.admit(t, rig.Review(t, freshID(), 1, whenFull("queue"), func(r map[string]any) { rig.AnnotationsOf(r)[annotationLength] = "0" }))
	if a.Allowed || !strings.Contains(a.Message, annotationLength+` is "0"`) || !strings.HasSuffix(a.Message, "; "+annotationWhenFull+` is "queue": it must be deny, wait or gate`) {
		t.Errorf("answered %+v", a)
	}
}

// asJob makes a request to create a Job of its pod.
func asJob(request map[string]any) {
	request["kind"] = map[string]any{"group": "batch", "version": "v1", "kind": "Job"}
	request["object"] = map[string]any{"spec": map[string]any{"template": request["object"]}}
}

// Whoever creates a Job hears that its pods may wait; Kubernetes cuts warnings at 120 characters.
func TestWarningsOfWaiting(t *testing.T) {
	for value, want := range map[string][]string{whenFullWait: {warningJobWaits}, whenFullGate: {warningJobGated}, whenFullDeny: nil} {
		w := startWebhook(t, testConfig(rig.FreeAddress(t)))
		body := rig.Review(t, freshID(), 1, func(r map[string]any) {
			whenFull(value)(r)
			asJob(r)
		})
		if a := w.admit(t, body); !a.Allowed || a.Patch != nil || !slices.Equal(a.Warnings, want) {
			t.Errorf("%s: answered %+v", value, a)
		}
	}
	for _, w := range []string{warningWaits, warningJobWaits, warningJob, warningNotCompleting, warningStatic, warningGated, warningJobGated, warningNotGated, warningNoGate, fmt.Sprintf(warningGrace, 9, giveBackSeconds), fmt.Sprintf(warningForgotten, "shop-of-many-kinds-of-things")} {
		if len(w) > 120 {
			t.Errorf("%d characters: %s", len(w), w)
		}
	}
}

// A pod that is made from the YAML of an admitted one does not keep the other's token.
func TestWaitingPodHasNoTokenOfAnother(t *testing.T) {
	c := testConfig("redis:6379")
	object := fixtures(t)["deployment-pod.json"]
	admitted := mustJSON(t, patched(t, c, object, testToken))
	waiting := patched(t, c, admitted, "")
	annotations := waiting["metadata"].(map[string]any)["annotations"].(map[string]any)
	if token, ok := annotations[annotationToken]; ok {
		t.Errorf("the token annotation is %v", token)
	}
	sidecars := containers(waiting, "initContainers")
	args := sidecars[0].(map[string]any)["args"].([]any)
	if len(sidecars) != 2 || args[len(args)-1] != "$(POD_UID)" {
		t.Errorf("the sidecars are %v", sidecars)
	}
	if again := patched(t, c, mustJSON(t, waiting), ""); string(mustJSON(t, again)) != string(mustJSON(t, waiting)) {
		t.Errorf("patched twice: %v", again)
	}
}

// With the etcd lock, the sidecar gets what the webhook itself has for it, from the Secret of its own namespace; and reads
// its own arguments.
func TestPatchForEtcd(t *testing.T) {
	for name, c := range map[string]struct {
		etcd   etcdSettings
		args   []string
		env    string
		volume string
	}{
		"nothing":  {etcdSettings{}, nil, "", ""},
		"password": {etcdSettings{username: "hook", password: rig.Password}, nil, "ETCD_USERNAME etcd/username, ETCD_PASSWORD etcd/password", ""},
		"all": {etcdSettings{username: "hook", password: rig.Password, caFile: "a", certFile: "b", keyFile: "c"},
			[]string{"--etcd-ca-file=" + etcdMountPath + "/ca.crt", "--etcd-cert-file=" + etcdMountPath + "/tls.crt", "--etcd-key-file=" + etcdMountPath + "/tls.key"},
			"ETCD_USERNAME etcd/username, ETCD_PASSWORD etcd/password", "ca.crt tls.crt tls.key"},
		"authority": {etcdSettings{caFile: "a"}, []string{"--etcd-ca-file=" + etcdMountPath + "/ca.crt"}, "", "ca.crt"},
	} {
		config := testConfig("redis:6379")
		config.lockMode, config.etcd, config.sidecarEtcdSecret, config.etcdAddresses = lockModeEtcd, c.etcd, "etcd", []string{"e:1", "f:1"}
		object := mustJSON(t, patched(t, config, fixtures(t)["bare-pod.json"], testToken))
		object = mustJSON(t, patched(t, config, object, testToken)) // as from the YAML of another
		if strings.Contains(string(object), rig.Password) {
			t.Errorf("%s: the password is in %s", name, object)
		}
		var p corev1.Pod
		rig.Must(t, json.Unmarshal(object, &p))
		sidecar := p.Spec.InitContainers[0]
		want := append([]string{"--lock-mode=etcd", "--etcd-addresses=e:1,f:1"}, c.args...)
		if got := sidecar.Args[6 : len(sidecar.Args)-2]; !slices.Equal(got, want) {
			t.Errorf("%s: args %q, want %q", name, got, want)
		}
		var env, files []string
		for _, e := range sidecar.Env {
			if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
				env = append(env, e.Name+" "+e.ValueFrom.SecretKeyRef.Name+"/"+e.ValueFrom.SecretKeyRef.Key)
			}
		}
		if got := strings.Join(env, ", "); got != c.env {
			t.Errorf("%s: environment %s", name, got)
		}
		var mounted []string
		for _, v := range p.Spec.Volumes {
			if v.Name == etcdVolumeName {
				mounted = append(mounted, v.Secret.SecretName)
				for _, i := range v.Secret.Items {
					files = append(files, i.Key)
				}
			}
		}
		if got := strings.Join(files, " "); got != c.volume || c.volume != "" && !slices.Equal(mounted, []string{"etcd"}) || (len(sidecar.VolumeMounts) > 0) != (c.volume != "") {
			t.Errorf("%s: volumes %v of %v, mounts %v", name, files, mounted, sidecar.VolumeMounts)
		}
	}
}

// The sidecar reads the arguments that the patch gives it.
func TestSidecarReadsItsArguments(t *testing.T) {
	c := testConfig("redis:6379")
	c.redisAddresses = []string{"a:1", "b:2", "c:3"}
	sidecar, _ := sidecarContainer(c, corev1.ResourceRequirements{}, testID, semaphoreSpec{length: 7, expiration: 12 * time.Second}, testToken)
	parsed, err := parseSidecarConfig(sidecar.Args[1:], func(name string) string { return map[string]string{"POD_UID": "uid"}[name] })
	rig.Must(t, err)
	if parsed.length != 7 || parsed.expiration != 12*time.Second || parsed.podUID != "uid" || parsed.lockMode != lockModeRedlock || !slices.Equal(parsed.redisAddresses, c.redisAddresses) {
		t.Errorf("parsed %+v", parsed)
	}
	c.enableSidecarContainers = false
	sidecar, _ = sidecarContainer(c, corev1.ResourceRequirements{}, testID, testSpec, testToken)
	parsed, err = parseSidecarConfig(sidecar.Args[1:], func(string) string { return "" })
	rig.Must(t, err)
	if parsed.length != 0 || sidecar.RestartPolicy != nil || len(sidecar.Env) != 3 || sidecar.Env[1].Name != "POD_NAME" || sidecar.Env[2].Name != "NODE_NAME" {
		t.Errorf("a classic sidecar: %+v, %+v", parsed, sidecar)
	}
}
